"""The files of a checkpoint, read without trust: bounded text, JSON objects, safetensors by rows, a content hash.

Weights are read without torch, one file or sharded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from dash_export.errors import CheckpointError
from dash_export.models.spec import DecoderSpec, Float32Array, Weight
from dash_export.text_files import MAX_TEXT_BYTES, bounded_text

CHUNK_BYTES = 8 << 20
MAX_AXES = 4  # a policy's tensors have three
_FLOATS = ("F64", "F32", "F16", "BF16")

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


@dataclass(frozen=True)
class SafetensorsWeight:
    """One tensor of a safetensors file."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str

    def read_rows(self, start: int, stop: int) -> Float32Array:
        """Rows [start, stop) as float32. Raises CheckpointError naming the tensor."""
        return read_in_chunks(self.name, self.shape, start, stop, self._read)

    def _read(self, start: int, stop: int) -> npt.NDArray[Any]:
        # Opened anew each time: closing it unmaps the file, and the pages read so far stop counting as ours.
        with _opened(self.path) as file:
            return file.get_slice(self.name)[start:stop]  # type: ignore[no-any-return]


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder. Raises CheckpointError when there are none or the index is not sound."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        return [folder / name for name in _shard_names(index)]
    if any(path.suffix in {".bin", ".pt", ".pth"} for path in folder.iterdir()):
        raise CheckpointError(
            f"{folder} has its weights as pickle (.bin, .pt) only, which can run code and is never opened; "
            "convert them: AutoModelForCausalLM.from_pretrained(...).save_pretrained(folder, safe_serialization=True)"
        )
    raise CheckpointError(f"{folder} has neither model.safetensors nor model.safetensors.index.json")


def open_weights(files: list[Path]) -> dict[str, SafetensorsWeight]:
    """Every tensor of the files by name, headers checked. Raises CheckpointError naming a file that is not sound."""
    weights: dict[str, SafetensorsWeight] = {}
    for path in files:
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; the index names it, so the download is incomplete")
        with _opened(path) as file:
            _refuse_twice(path)
            for name in file.keys():  # noqa: SIM118 - not a dict
                if name in weights:
                    raise ValueError(f"{name!r:.100} is in {weights[name].path.name} too")
                entry = file.get_slice(name)
                shape = tuple(entry.get_shape())
                if len(shape) > MAX_AXES:
                    raise ValueError(f"{name!r:.100} has {len(shape)} axes")
                weights[name] = SafetensorsWeight(path, name, shape, entry.get_dtype())
    return weights


def read_metadata(path: Path) -> dict[str, str]:
    """The free-form part of the file's header. Raises CheckpointError when the file is not sound."""
    with _opened(path) as file:
        return dict(file.metadata() or {})


def _refuse_twice(path: Path) -> None:
    """Raises ValueError for a name that is there twice in the header: the library, which finds it sound, takes the last
    and another one maybe the first.
    """

    def check(pairs: list[tuple[str, object]]) -> None:
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"{name!r:.100} is there twice")
            seen.add(name)

    with path.open("rb") as file:
        json.loads(file.read(int.from_bytes(file.read(8), "little")), object_pairs_hook=check)


def check_dtype(weight: SafetensorsWeight) -> None:
    """Raises CheckpointError when the tensor is not stored in a float type that numpy can widen."""
    if weight.dtype not in _FLOATS:
        raise CheckpointError(
            f"tensor {weight.name} in {weight.path} has dtype {weight.dtype}; supported: {', '.join(_FLOATS)}"
        )


def _shard_names(index: Path) -> list[str]:
    weight_map = parse_object(read_text(index), str(index)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no 'weight_map' object from tensor names to files")
    names: set[str] = set()
    for tensor, name in weight_map.items():
        # A plain file name only: the index is untrusted and must not point out of its folder.
        if not isinstance(name, str) or Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{index} places tensor {tensor[:100]!r} in {str(name)[:100]!r}; "
                "expected the name of a .safetensors file in the same folder"
            )
        names.add(name)
    return sorted(names)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    safetensors = require("safetensors")
    require("ml_dtypes")  # gives numpy its bfloat16
    try:
        with safetensors.safe_open(str(path), framework="np") as file:
            yield file
    except (safetensors.SafetensorError, OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path} is not a sound safetensors file (truncated or damaged?): {error!s:.300}"
        ) from error
