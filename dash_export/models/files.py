"""Reading the files of a checkpoint without trusting them: bounded text, JSON objects, tensor rows, a content hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from dash_export.errors import CheckpointError
from dash_export.models.spec import DecoderSpec, Float32Array, Weight
from dash_export.text_files import MAX_TEXT_BYTES, bounded_text

CHUNK_BYTES = 8 << 20

AnyWeight = TypeVar("AnyWeight", bound=Weight)


def require(module: str) -> Any:
    """Import a library of the `export` extra; CheckpointError with the command that installs it when it is missing."""
    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise CheckpointError(f"reading models needs {package}: pip install 'dash-export[export]'") from error


def read_text(path: Path) -> str:
    """A regular UTF-8 file of at most MAX_TEXT_BYTES. Raises CheckpointError naming it."""
    try:
        return bounded_text(path, MAX_TEXT_BYTES)
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error


def parse_object(text: str, name: str) -> dict[str, Any]:
    """The JSON object in `text`. Raises CheckpointError naming the file when it is anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{name} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{name} holds a JSON {type(value).__name__}; expected an object")
    return value


def read_in_chunks(
    name: str,
    shape: tuple[int, ...],
    start: int,
    stop: int,
    read: Callable[[int, int], npt.NDArray[Any]],
) -> Float32Array:
    """Rows [start, stop) of tensor `name` as float32, through `read(start, stop)` on chunks: small temporaries.

    Raises CheckpointError when a value is NaN or infinite, IndexError when the rows do not exist.
    """
    if not 0 <= start <= stop <= shape[0]:
        raise IndexError(f"rows {start}:{stop} of {name}, which has {shape[0]}")
    rows = np.empty((stop - start, *shape[1:]), dtype=np.float32)
    step = max(1, CHUNK_BYTES // (4 * int(np.prod(shape[1:], dtype=np.int64))))
    for begin in range(start, stop, step):
        end = min(stop, begin + step)
        target = rows[begin - start : end - start]
        with np.errstate(all="ignore"):  # overflow and NaN are found below, with the tensor's name
            target[...] = read(begin, end)
        if not np.isfinite(target).all():
            raise CheckpointError(
                f"tensor {name} holds NaN or infinity in rows {begin} to {end - 1}; the weights are damaged"
            )
    return rows


def check_weights(spec: DecoderSpec, weights: Mapping[str, AnyWeight], source: str) -> dict[str, AnyWeight]:
    """The weights `spec` needs, in its order. Raises CheckpointError for a missing one or one of another shape."""
    needed = spec.weight_shapes()
    missing = [name for name in needed if name not in weights]
    if missing == ["lm_head.weight"]:
        raise CheckpointError(
            f"{source} has no lm_head.weight although the config does not tie the head to the embedding; "
            'set "tie_word_embeddings": true in config.json if the model was trained that way'
        )
    if missing:
        raise CheckpointError(f"{source} lacks {len(missing)} of {len(needed)} tensors, the first is {missing[0]}")
    for name, shape in needed.items():
        if weights[name].shape != shape:
            found = list(weights[name].shape)
            raise CheckpointError(f"tensor {name} in {source} has shape {found}; the config asks for {list(shape)}")
    return {name: weights[name] for name in needed}


def fingerprint(config_text: str, tensors: Iterable[str], files: Iterable[Path]) -> str:
    """SHA-256 over the config, one line per tensor, and the size and content of every weight file."""
    digest = hashlib.sha256(config_text.encode())
    for tensor in tensors:
        digest.update(b"\n" + tensor.encode())
    for path in files:
        digest.update(f"\n{path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
    return digest.hexdigest()
