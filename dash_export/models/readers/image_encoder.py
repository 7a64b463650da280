"""A Hugging Face folder of an image encoder as a checkpoint."""

from dataclasses import replace
from importlib import import_module
from math import prod
from pathlib import Path

from dash_export.bundle.layout import PREPROCESSOR
from dash_export.errors import CheckpointError
from dash_export.models.config import Config
from dash_export.models.encoders import EncoderFamily
from dash_export.models.readers.weights import checked_weights, fingerprint, open_weights, read_text
from dash_export.models.spec import (
    CLASS_TOKEN,
    POSITIONS,
    EncoderCheckpoint,
    Weight,
)  # fmt: skip


def open_encoder(
    folder: Path, source: str, config_text: str, config: Config, files: list[Path], seen: dict[Path, tuple[int, ...]]
) -> EncoderCheckpoint:
    """Return the checkpoint of an image encoder's folder. Raises CheckpointError."""
    from dash_export.images.processor import ImageProcessor  # needs Pillow, which a decoder's export does not

    path = folder / PREPROCESSOR
    if not path.is_file():
        raise CheckpointError(f"{folder} has no {PREPROCESSOR}: nothing says how its pictures are prepared")
    prepared = read_text(path)
    size = ImageProcessor.parse(prepared, str(path)).size
    family: EncoderFamily = import_module(f"dash_export.models.families.{config['model_type']}").encoder(config, size)
    name = "".join(filter(str.isprintable, Path(source).absolute().name)) or "model"
    spec = replace(family.spec, name=name)
    stored = open_weights(files)
    first = family.names("model.patch.weight")
    prefix = next((each for each in family.prefixes if each + first in stored), "")
    weights = {
        own: found_weight(family.names(own), prefix, own, shape, stored) for own, shape in spec.weight_shapes().items()
    }
    known = {own: weight for own, weight in weights.items() if weight is not None}
    assets = {"config.json": config_text, PREPROCESSOR: prepared}
    checked = checked_weights(source, spec.weight_shapes(), known)
    return EncoderCheckpoint(source, spec, config, checked, assets, fingerprint(assets.values(), checked, files), seen)


def found_weight(name: str, prefix: str, own: str, shape: tuple[int, ...], stored: dict[str, Weight]) -> Weight | None:
    """Return the weight of that name in the file: a part of its rows, or in another shape, where the name says so."""
    name, _, part = name.partition("#")
    weight = stored.get(prefix + name) or stored.get(name)  # a classifier stands beside the encoder
    if weight is None:
        return None
    whole = weight
    if part:
        place, count = map(int, part.split("/"))
        first = place * (whole.shape[0] // count)
        return replace(
            whole,
            name=own,
            shape=(whole.shape[0] // count, *whole.shape[1:]),
            rows=lambda start, stop: whole.rows(first + start, first + stop),
        )
    if own in (CLASS_TOKEN, POSITIONS) and whole.shape != shape and prod(whole.shape) == prod(shape):
        return replace(
            whole,
            name=own,
            shape=shape,
            rows=lambda start, stop: whole.read_rows(0, whole.shape[0]).reshape(shape)[start:stop],
        )
    return replace(whole, name=own)
