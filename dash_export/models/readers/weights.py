"""The files of a checkpoint, read without trust: JSON, safetensors by rows, a content hash. Nothing needs torch."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from importlib import import_module
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from dash_export.errors import CheckpointError
from dash_export.models.spec import LAYERS, Checkpoint, DecoderSpec, Weight, layer_weight
from dash_export.text.text_files import MAX_TEXT_BYTES, bounded_text

CHUNK_BYTES = 8 << 20
MAX_HEADER = 16 << 20
_T = TypeVar("_T")
_FLOATS = ("F64", "F32", "F16", "BF16")


def require(module: str) -> Any:
    """Import a library of the `export` extra. Raises CheckpointError with the install command when it is missing."""
    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise CheckpointError(f"reading models needs {package}: pip install 'dash-export[export]'") from error


def read_text(path: Path) -> str:
    """Return the text of a regular UTF-8 file of at most MAX_TEXT_BYTES. Raises CheckpointError naming the file."""
    try:
        return bounded_text(path, MAX_TEXT_BYTES)
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read as UTF-8 text: {error}") from error


def read_json(path: Path) -> tuple[str, dict[str, Any]]:
    """Return (text, JSON object) of a file. Raises CheckpointError naming the file when it holds anything else."""
    return read_json_as(dict, path)


def read_json_as(kind: type[_T], path: Path) -> tuple[str, _T]:
    """Return (text, JSON of a `kind`, dict or list) of a file, as `read_json` does."""
    text = read_text(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, kind):
        expected = "an object" if kind is dict else "a list"
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}; expected {expected}")
    return text, value


def build_checkpoint(
    source: str,
    spec: DecoderSpec,
    config: Mapping[str, Any],
    stored: Mapping[str, Weight],
    assets: Mapping[str, str],
    files: list[Path],
    seen: Mapping[Path, tuple[int, ...]],
) -> Checkpoint:
    """Return the checkpoint of the weights that `spec` needs, out of those that are `stored` in `files`. `assets` must
    include config.json. Raises CheckpointError for a weight that is missing, of another shape, or cannot be read.
    """
    needed = spec.weight_shapes()
    if [name for name in needed if name not in stored] == ["lm_head.weight"]:
        raise CheckpointError(
            f"{source} has no lm_head.weight although the config does not tie the head to the embedding; "
            'set "tie_word_embeddings": true in config.json if the model was trained that way'
        )
    weights = checked_weights(source, needed, stored)
    key = fingerprint([assets["config.json"]], weights, files)
    return Checkpoint(source, spec, config, weights, assets, key, seen)


def checked_weights(
    source: str, needed: Mapping[str, tuple[int, ...]], stored: Mapping[str, Weight]
) -> dict[str, Weight]:
    """Return the weights that a spec needs, out of those that are `stored`. Raises CheckpointError for one that is
    missing, of another shape, or cannot be read.
    """
    missing = [name for name in needed if name not in stored]
    if missing:
        raise CheckpointError(f"{source} lacks {len(missing)} of {len(needed)} tensors, the first is {missing[0]}")
    weights = {name: stored[name] for name in needed}
    for name, weight in weights.items():
        if weight.shape != needed[name]:
            found = list(weight.shape)
            raise CheckpointError(
                f"tensor {name} in {source} has shape {found}; the config asks for {list(needed[name])}"
            )
        weight.read_rows(0, 1)  # fail now, not in the middle of an export
    return weights


def fingerprint(texts: Iterable[str], weights: Mapping[str, Weight], files: Iterable[Path]) -> str:
    """Return a key that changes with these texts, with the weights, and with every byte of the files."""
    digest = hashlib.sha256("".join(texts).encode())
    for name, weight in weights.items():
        digest.update(f"\n{name} {list(weight.shape)} {weight.dtype}".encode())
    for path in files:
        digest.update(f"\n{path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
    return digest.hexdigest()


_FUSED = {"self_attn.qkv_proj": ("q", "k", "v"), "mlp.gate_up_proj": ("gate", "up")}


def fused_names(spec: DecoderSpec) -> list[str]:
    """Return the names of the fused matrices of all layers; there are none unless `spec.fused`."""
    return [layer_weight(layer, f"{whole}.weight") for layer in range(spec.num_layers * spec.fused) for whole in _FUSED]


def unfused(spec: DecoderSpec, stored: dict[str, Weight]) -> dict[str, Weight]:
    """Return the weights with every fused matrix (Q, K and V; gate and up) split into one matrix per projection."""
    shapes, found = spec.weight_shapes(), dict(stored)
    for name in fused_names(spec):
        layer, _, whole = name.removesuffix(".weight").removeprefix(LAYERS).partition(".")
        names = [layer_weight(int(layer), f"{whole.partition('.')[0]}.{part}_proj.weight") for part in _FUSED[whole]]
        fused, start = found.pop(name, None), 0
        if fused is None or fused.shape != (sum(shapes[part][0] for part in names), spec.hidden_size):
            continue  # `build_checkpoint` reports the parts as missing
        for part in names:
            packed = fused.packed and partial(_rows_from, fused.packed, start)
            rows = partial(_rows_from, fused.rows, start)
            found[part] = Weight(part, shapes[part], fused.dtype, rows, packed)
            start += shapes[part][0]
    return found


def _rows_from(read: Callable[[int, int], npt.NDArray[Any]], first: int, start: int, stop: int) -> npt.NDArray[Any]:
    return read(first + start, first + stop)


def open_weights(files: list[Path]) -> dict[str, Weight]:
    """Return every tensor of the files by name, headers checked. Raises CheckpointError naming a damaged file."""
    safetensors, weights = require("safetensors"), dict[str, Weight]()
    require("ml_dtypes")  # gives numpy its bfloat16
    for path in files:
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; the index names it, so the download is incomplete")
        try:
            with safetensors.safe_open(str(path), framework="np"):  # the library checks the header and its offsets
                header, data = _header(path)
            for name, entry in header.items():
                if name in weights:
                    raise ValueError(f"{name!r:.100} is in another file of the model too")
                shape, dtype = tuple(entry["shape"]), entry["dtype"]
                offset = data + entry["data_offsets"][0]
                weights[name] = Weight(name, shape, dtype, partial(_rows, path, name, dtype, shape, offset))
        except (safetensors.SafetensorError, OSError, ValueError, TypeError) as error:
            raise CheckpointError(
                f"{path} is not a sound safetensors file (truncated or damaged?): {error!s:.300}"
            ) from error
    return weights


def _rows(
    path: Path, name: str, dtype: str, shape: tuple[int, ...], offset: int, start: int, stop: int
) -> npt.NDArray[Any]:
    if dtype not in _FLOATS:
        raise CheckpointError(f"tensor {name:.100} in {path} has dtype {dtype}; supported: {', '.join(_FLOATS)}")
    kind = np.dtype(require("ml_dtypes").bfloat16 if dtype == "BF16" else f"<f{int(dtype[1:]) // 8}")
    row_bytes = prod(shape[1:]) * kind.itemsize
    data = tensor_bytes(path, name, offset + start * row_bytes, (stop - start) * row_bytes)
    return np.frombuffer(data, kind).reshape(stop - start, *shape[1:])


def tensor_bytes(path: Path, name: str, offset: int, size: int) -> bytes:
    """Return a part of a tensor. Raises CheckpointError if the file is cut."""
    # Read, not mapped: the resident set does not grow with the part of the model read so far.
    with path.open("rb") as file:
        file.seek(offset)
        data = file.read(size)
    if len(data) != size:
        raise CheckpointError(f"{path} ends inside tensor {name:.100}: the file changed while it was read")
    return data


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """Return (tensors of a file's header, offset of their data). Raises ValueError for a name that occurs twice (the
    library takes the last, another reader may take the first), and for a header larger than any model has.
    """

    def once(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) != len(pairs):
            (name, _), *_ = Counter(name for name, _ in pairs).most_common(1)
            raise ValueError(f"{name!r:.100} is there twice")
        return found

    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > MAX_HEADER:
            raise ValueError(f"its header has {size} bytes; {MAX_HEADER} at most are read")
        header = json.loads(file.read(size), object_pairs_hook=once)
    header.pop("__metadata__", None)
    return header, 8 + size
