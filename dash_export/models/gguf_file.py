"""The structure of a GGUF file (spec: ggml/docs/gguf.md): metadata and where each tensor lies, every length checked.

Not `gguf.GGUFReader`: it keeps two array views per string (160 MB and 1.7 s for a 49k vocabulary), loops over absurd
lengths and does not notice a truncated file. The constants and the dequantisation still come from that library.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dash_export.errors import CheckpointError
from dash_export.models.weights import require

MAX_ENTRIES = 1 << 16  # metadata keys, and tensors
MAX_ELEMENTS = 1 << 21  # of all metadata arrays: a vocabulary of 262,144 takes 1.3 million
MAX_STRING = 16 << 20

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_FLOAT32, _STRING, _ARRAY = 6, 8, 9


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies: `shape` is [out, in] as in Hugging Face, `row_bytes` the size of one row."""

    name: str
    shape: tuple[int, ...]
    quantization: int
    offset: int
    row_bytes: int

    @property
    def size(self) -> int:
        """Bytes of all rows, not wrapped around however absurd the shape."""
        return math.prod(self.shape[:-1]) * self.row_bytes


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file whose structure has been checked against its size."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


def read_gguf(path: Path) -> GgufFile:
    """Parse the header. Raises CheckpointError, quickly, for a file that is corrupt, truncated or of another kind."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        cursor = _Cursor(stream, size, path)
        if cursor.read(4) != b"GGUF":
            raise CheckpointError(f"{path} is not a GGUF file; give a .gguf file or a Hugging Face folder")
        version = cursor.scalar("<I")
        if version not in (2, 3):
            raise CheckpointError(f"{path} is GGUF version {version}; supported: 2 and 3, little-endian")
        tensor_count = cursor.count("tensors", MAX_ENTRIES)
        metadata = _named(cursor, cursor.count("metadata keys", MAX_ENTRIES), _value)
        infos = _named(cursor, tensor_count, _tensor_info)
        alignment = metadata.get("general.alignment", 32)
        if (
            isinstance(alignment, bool)
            or not isinstance(alignment, int)
            or alignment <= 0
            or alignment & (alignment - 1)
        ):
            raise cursor.damaged("general.alignment is not a power of two")
        # As llama.cpp asks for it: in the order of the list, each at the padded end of the one before, nothing between.
        start = end = -(-cursor.position // alignment) * alignment
        tensors = {}
        for name, info in infos.items():
            tensors[name] = tensor = _place(cursor, name, info, start)
            if tensor.offset != end:
                raise cursor.damaged(f"tensor {name[:100]} is said to begin at byte {tensor.offset}, not at {end}")
            end = -(-(end + tensor.size) // alignment) * alignment
        if size > end:  # the padding of the last one may be there or not
            raise cursor.damaged(f"{size - end} bytes after its last tensor belong to none")
    return GgufFile(path, metadata, tensors)


class _Cursor:
    """Sequential reads that know how much of the file is left."""

    def __init__(self, stream: BinaryIO, size: int, path: Path) -> None:
        self._stream, self.size, self.path, self.position, self.elements = stream, size, path, 0, 0

    def damaged(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is a damaged GGUF file: {what}; download or convert it again")

    def read(self, count: int) -> bytes:
        data = self._stream.read(count) if count <= self.size - self.position else b""
        if len(data) != count:
            raise self.damaged(f"it ends at byte {self.size}, {count} more bytes were announced at {self.position}")
        self.position += count
        return data

    def scalar(self, code: str) -> Any:
        return struct.unpack(code, self.read(struct.calcsize(code)))[0]

    def count(self, what: str, upper: int) -> int:
        number: int = self.scalar("<Q")
        if number > upper:
            raise self.damaged(f"it announces {number} {what}, and there may be {upper}")
        return number

    def string(self) -> str:
        try:
            return self.read(self.count("characters in a string", MAX_STRING)).decode("utf-8")
        except UnicodeDecodeError:
            raise self.damaged(f"a string before byte {self.position} is not UTF-8") from None


def _named(cursor: _Cursor, count: int, read: Callable[[_Cursor], Any]) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    for _ in range(count):
        name = cursor.string()
        if name in entries:
            raise cursor.damaged(f"{name[:100]!r} occurs twice")
        entries[name] = read(cursor)
    return entries


def _value(cursor: _Cursor) -> Any:
    kind = cursor.scalar("<I")
    if kind == _STRING:
        return cursor.string()
    if kind == _ARRAY:
        return _array(cursor)
    if kind == _FLOAT32:
        # The shortest decimal that is this float32: 1e-05, not 9.999999747378752e-06.
        return float(str(np.float32(cursor.scalar("<f"))))
    if kind in _SCALARS:
        return cursor.scalar(_SCALARS[kind])
    raise cursor.damaged(f"metadata of unknown type {kind}")


def _array(cursor: _Cursor) -> list[Any]:
    kind, count = cursor.scalar("<I"), cursor.count("elements in arrays", MAX_ELEMENTS - cursor.elements)
    cursor.elements += count
    if kind == _STRING:
        return [cursor.string() for _ in range(count)]
    if kind not in _SCALARS:
        raise cursor.damaged(f"an array with elements of type {kind}")
    dtype = np.dtype(_SCALARS[kind])
    values: list[Any] = np.frombuffer(cursor.read(count * dtype.itemsize), dtype=dtype).tolist()
    return values


def _tensor_info(cursor: _Cursor) -> tuple[tuple[int, ...], int, int]:
    """(shape, quantisation, offset) with the shape turned to Hugging Face's order."""
    axes = cursor.scalar("<I")
    if not 1 <= axes <= 4:
        raise cursor.damaged(f"a tensor with {axes} dimensions")
    shape = tuple(cursor.scalar("<Q") for _ in range(axes))
    return shape[::-1], cursor.scalar("<I"), cursor.scalar("<Q")


def _place(cursor: _Cursor, name: str, info: tuple[tuple[int, ...], int, int], data_start: int) -> GgufTensor:
    gguf = require("gguf")
    shape, quantization, offset = info
    sizes = gguf.GGML_QUANT_SIZES.get(quantization)
    if sizes is None:
        raise cursor.damaged(f"tensor {name[:100]} has unknown type {quantization}")
    block, block_bytes = sizes
    if min(shape) < 1 or shape[-1] % block:
        raise cursor.damaged(f"tensor {name[:100]} of type {quantization} cannot have shape {list(shape)}")
    row_bytes = shape[-1] // block * block_bytes
    tensor = GgufTensor(name, shape, quantization, data_start + offset, row_bytes)
    end = tensor.offset + tensor.size
    if end > cursor.size:
        raise cursor.damaged(f"tensor {name[:100]} ends at byte {end}, the file at {cursor.size} (truncated?)")
    return tensor
