"""A Hugging Face folder of an encoder as a checkpoint; sentence-transformers' modules say how texts are pooled."""

from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from math import prod
from pathlib import Path
from typing import Any, Literal, NamedTuple

from dash_export.bundle.layout import PREPROCESSOR
from dash_export.core.facts import LARGEST
from dash_export.errors import CheckpointError
from dash_export.files.artifacts import identity
from dash_export.files.typed_json import shown
from dash_export.models.config import TEXT_ENCODERS, Config, flag, positive
from dash_export.models.encoders import EncoderFamily
from dash_export.models.readers.weights import (
    checked_weights,
    fingerprint,
    open_weights,
    read_json,
    read_json_as,
    read_text,
)
from dash_export.models.spec import CLASS_TOKEN, POSITIONS, Dense, EncoderCheckpoint, Weight

MODULES = "modules.json"
_POOLING = {"cls": "class", "cls_token": "class", "mean": "mean", "mean_tokens": "mean"}
_ACTIVATIONS: dict[str, Literal["tanh", ""]] = {"Identity": "", "Tanh": "tanh"}
_POOLER = "pool.dense_0.weight"


class _Ends(NamedTuple):
    """What a folder's modules say: fields of the spec, weights of the dense layers by name, files seen."""

    fields: dict[str, Any]
    weights: dict[str, Weight]
    seen: dict[Path, tuple[int, ...]]

    def saw(self, path: Path) -> Path:
        if path.is_file():
            self.seen[path] = identity(path)
        return path


def open_encoder(
    folder: Path,
    source: str,
    assets: Mapping[str, str],
    config: Config,
    files: list[Path],
    seen: dict[Path, tuple[int, ...]],
) -> EncoderCheckpoint:
    """Return the checkpoint of an encoder's folder. The pooled vector of a text is what its modules.json says; without
    one what transformers calls `pooler_output` where there are weights for it, else the first token. Raises
    CheckpointError.
    """
    encoder = import_module(f"dash_export.models.families.{config['model_type']}").encoder
    texts, ends = config["model_type"] in TEXT_ENCODERS, _Ends({}, {}, {})
    if not texts:
        prepared, size = _preparation(folder / PREPROCESSOR)
        assets = {**assets, PREPROCESSOR: prepared}
    family: EncoderFamily = encoder(config) if texts else encoder(config, size)
    stored = open_weights(files)
    first = family.names(next(iter(family.spec.weight_shapes())))
    prefix = next((each for each in family.prefixes if each + first in stored), "")
    if texts and (folder / MODULES).is_file():
        ends = _ends(folder, family.spec.hidden_size)
    elif texts and prefix + family.names(_POOLER) in stored:
        ends.fields["dense"] = (Dense(family.spec.hidden_size, "tanh"),)
    name = "".join(filter(str.isprintable, Path(source).absolute().name)) or "model"
    spec = replace(family.spec, name=name, **ends.fields)
    shapes = spec.weight_shapes()
    weights = {
        own: ends.weights.get(own) or found_weight(family.names(own), prefix, own, shape, stored)
        for own, shape in shapes.items()
    }
    checked = checked_weights(source, shapes, {own: weight for own, weight in weights.items() if weight is not None})
    key = fingerprint(assets.values(), checked, [*files, *ends.seen])
    return EncoderCheckpoint(source, spec, config, checked, assets, key, seen | ends.seen)


def _preparation(path: Path) -> tuple[str, tuple[int, int]]:
    """Return the text of preprocessor_config.json, and the size of pictures that it says."""
    from dash_export.images.processor import ImageProcessor  # needs Pillow, which a decoder's export does not

    if not path.is_file():
        raise CheckpointError(f"{path.parent} has no {PREPROCESSOR}: nothing says how its pictures are prepared")
    prepared = read_text(path)
    return prepared, ImageProcessor.parse(prepared, str(path)).size


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


def _ends(folder: Path, hidden: int) -> _Ends:
    """Read the modules behind the transformer. Raises CheckpointError for those that have no place here."""
    ends = _Ends({"pooling": "", "dense": ()}, {}, {})
    _, modules = read_json_as(list, ends.saw(folder / MODULES))
    for place, module in enumerate(modules):
        kind, path = (str(module.get(key, "")) if isinstance(module, dict) else "" for key in ("type", "path"))
        kind, own = kind.rpartition(".")[2], folder / path
        if path and (Path(path).name != path or path == ".."):  # untrusted: it must not point out of its folder
            raise CheckpointError(f"{folder / MODULES} has a module in {shown(path)}; expected a folder beside it")
        if kind == "Transformer" and place == 0:
            continue
        if kind == "Normalize" and ends.fields["pooling"]:
            ends.fields["unit_length"] = True
            continue
        if kind not in ("Pooling", "Dense") or ends.fields.get("unit_length"):
            raise CheckpointError(
                f"{folder / MODULES} has a module {shown(kind)} that is not supported there; supported: Transformer, "
                "Pooling, Dense, Normalize, in this order"
            )
        _, config = read_json(ends.saw(own / "config.json"))
        if kind == "Pooling":
            ends.fields["pooling"] = _pooling(config, own)
        else:
            dense, weights = _dense(config, own, ends.saw(own / "model.safetensors"))
            number = len(ends.fields["dense"])
            ends.fields["dense"] += (dense,)
            ends.weights.update({f"pool.dense_{number}.{part}": weight for part, weight in weights.items()})
    if not ends.fields["pooling"]:
        raise CheckpointError(f"{folder / MODULES} has no Pooling module: nothing says how a text becomes one vector")
    if (dense := ends.fields["dense"]) and dense[-1].size != hidden:
        raise CheckpointError(
            f"the last Dense module of {folder} gives {dense[-1].size} numbers; supported: {hidden}, as a state has"
        )
    return ends


def _pooling(config: Config, folder: Path) -> str:
    modes = [key.removeprefix("pooling_mode_") for key, on in config.items() if key.startswith("pooling_mode_") and on]
    modes = [config["pooling_mode"]] if isinstance(config.get("pooling_mode"), str) else modes
    if len(modes) != 1 or modes[0] not in _POOLING:
        raise CheckpointError(
            f"{folder} pools by {shown(modes)}; supported: one of pooling_mode_mean_tokens and pooling_mode_cls_token"
        )
    return _POOLING[modes[0]]


def _dense(config: Config, folder: Path, file: Path) -> tuple[Dense, dict[str, Weight]]:
    kind = str(config.get("activation_function", "Tanh")).rpartition(".")[2]
    if kind not in _ACTIVATIONS:
        raise CheckpointError(f"{folder} has the activation {shown(kind)}; supported: {', '.join(_ACTIVATIONS)}")
    if not file.is_file():
        raise CheckpointError(f"{folder} has no model.safetensors: save the model anew with safe_serialization=True")
    biased = flag(config, "bias", True)
    size = positive(config, "out_features", LARGEST["hidden_size"])
    stored = open_weights([file])
    parts = [part for part in ("weight", "bias")[: 1 + biased] if f"linear.{part}" in stored]
    weights = {part: replace(stored[f"linear.{part}"], name=f"{folder.name}.{part}") for part in parts}
    return Dense(size, _ACTIVATIONS[kind], biased), weights
