"""A GGUF file (spec: ggml/docs/gguf.md): its metadata, and its tensors by rows, every length checked.

`gguf.GGUFReader` is not used: it keeps two array views per string (160 MB and 1.7 s for a 49k vocabulary), loops over
absurd lengths and misses a truncated file. The constants and the dequantisation still come from that library.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from dash_export.errors import CheckpointError
from dash_export.models.readers.weights import require, tensor_bytes
from dash_export.models.spec import Weight

MAX_ENTRIES = 1 << 16  # metadata keys, and tensors
MAX_ELEMENTS = 1 << 21  # of all metadata arrays: a vocabulary of 262,144 takes 1.3 million
MAX_STRING = 16 << 20

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_FLOAT32, _STRING, _ARRAY = 6, 8, 9


@dataclass(frozen=True)
class GgufTensor:
    """Place of a tensor: rows of `row_bytes` bytes from `offset` on; `shape` is [out, in] as in Hugging Face."""

    path: Path
    name: str
    shape: tuple[int, ...]
    quantization: int
    offset: int
    row_bytes: int

    def weight(self, name: str, interleaved_heads: int = 0) -> Weight:
        """Return the tensor as a model's Weight. `interleaved_heads`: number of heads whose rotary pairs are adjacent
        rows in the file and must be split in halves; 0 for none.
        """
        rows, packed = self.rows, self.packed
        if interleaved_heads:
            rows = partial(self._head_rows, self.rows, interleaved_heads)
            packed = partial(self._head_rows, self.packed, interleaved_heads)
        return Weight(name, self.shape, self.kind.name, rows, packed)

    @property
    def kind(self) -> Any:
        return require("gguf").GGMLQuantizationType(self.quantization)

    def _head_rows(
        self, read: Callable[[int, int], npt.NDArray[Any]], heads: int, start: int, stop: int
    ) -> npt.NDArray[Any]:
        """Undo the converter's permutation: row 2i + j of a GGUF head is row j * head_dim / 2 + i in Hugging Face's."""
        head_dim = self.shape[0] // heads
        first, last = start // head_dim, -(-stop // head_dim)
        rows = read(first * head_dim, last * head_dim)
        split = rows.reshape(last - first, head_dim // 2, 2, *rows.shape[1:]).swapaxes(1, 2)
        permuted: npt.NDArray[Any] = split.reshape(rows.shape)
        return permuted[start - first * head_dim : stop - first * head_dim]

    def rows(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Return rows [start, stop), dequantised; of a vector, which is stored as one row, elements [start, stop)."""
        if len(self.shape) == 1:
            return self._dequantized(0, 1)[0, start:stop]
        return self._dequantized(start, stop)

    def packed(self, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """Return rows [start, stop) as in the file, uint8 [rows, bytes]. Raises CheckpointError if the file is cut."""
        size = (stop - start) * self.row_bytes
        data = tensor_bytes(self.path, self.name, self.offset + start * self.row_bytes, size)
        return np.frombuffer(data, dtype=np.uint8).reshape(stop - start, self.row_bytes)

    def _dequantized(self, start: int, stop: int) -> npt.NDArray[Any]:
        try:
            return require("gguf").dequantize(self.packed(start, stop), self.kind)  # type: ignore[no-any-return]
        except NotImplementedError:
            raise CheckpointError(
                f"tensor {self.name} in {self.path} has type {self.kind.name}, which cannot be dequantised; "
                "supported: F32, F16, BF16, Q4_0 to Q8_0, the K- and IQ-quants"
            ) from None


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    """Return (metadata, tensors by their names in the file). Raises CheckpointError, quickly, for a file that is
    corrupt, truncated or of another kind.
    """
    with path.open("rb") as stream:
        header = _Header(path, stream)
        if stream.read(4) != b"GGUF":
            raise CheckpointError(f"{path} is not a GGUF file; give a .gguf file or a Hugging Face folder")
        if (version := header.number("<I")) not in (2, 3):
            raise CheckpointError(f"{path} is GGUF version {version}; supported: 2 and 3, little-endian")
        tensor_count = header.count("tensors", MAX_ENTRIES)
        metadata = header.named(header.count("metadata keys", MAX_ENTRIES), header.value)
        infos = header.named(tensor_count, header.tensor)
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
            raise header.damaged("general.alignment is not a power of two")
        # llama.cpp requires tensors in the order of the list, each at the padded end of the one before, without gaps.
        start = end = -(-stream.tell() // alignment) * alignment
        tensors = {}
        for name, (shape, quantization, row_bytes, offset) in infos.items():
            if start + offset != end:
                raise header.damaged(f"tensor {name:.100} is said to begin at byte {start + offset}, not at {end}")
            tensors[name] = GgufTensor(path, name, shape, quantization, end, row_bytes)
            end += prod(shape[:-1]) * row_bytes  # a Python integer cannot overflow
            if end > header.size:
                raise header.damaged(f"tensor {name:.100} ends at byte {end}, the file at {header.size} (truncated?)")
            end = -(-end // alignment) * alignment
        if header.size > end:  # padding after the last tensor is optional
            raise header.damaged(f"{header.size - end} bytes after its last tensor belong to none")
    return metadata, tensors


class _Header:
    """Sequential reader of a file's header that checks every length against the bytes that are left."""

    def __init__(self, path: Path, stream: BinaryIO) -> None:
        self.path, self.stream, self.size, self.elements = path, stream, path.stat().st_size, 0

    def damaged(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is a damaged GGUF file: {what}; download or convert it again")

    def read(self, count: int) -> bytes:
        at = self.stream.tell()
        data = self.stream.read(count) if count <= self.size - at else b""
        if len(data) != count:
            raise self.damaged(f"it ends at byte {self.size}, {count} more bytes were announced at {at}")
        return data

    def number(self, code: str) -> Any:
        return struct.unpack(code, self.read(struct.calcsize(code)))[0]

    def count(self, what: str, upper: int) -> int:
        number: int = self.number("<Q")
        if number > upper:
            raise self.damaged(f"it announces {number} {what}, and there may be {upper}")
        return number

    def string(self) -> str:
        try:
            return self.read(self.count("characters in a string", MAX_STRING)).decode("utf-8")
        except UnicodeDecodeError:
            raise self.damaged(f"a string before byte {self.stream.tell()} is not UTF-8") from None

    def named(self, count: int, read: Callable[[], Any]) -> dict[str, Any]:
        entries: dict[str, Any] = {}
        for _ in range(count):
            name = self.string()
            if name in entries:
                raise self.damaged(f"{name[:100]!r} occurs twice")
            entries[name] = read()
        return entries

    def value(self) -> Any:
        kind = self.number("<I")
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array()
        if kind not in _SCALARS:
            raise self.damaged(f"metadata of unknown type {kind}")
        value = self.number(_SCALARS[kind])
        # The shortest decimal that is this float32: 1e-05, not 9.999999747378752e-06.
        return float(str(np.float32(value))) if kind == _FLOAT32 else value

    def array(self) -> list[Any]:
        kind, count = self.number("<I"), self.count("elements in arrays", MAX_ELEMENTS - self.elements)
        self.elements += count
        if kind == _STRING:
            return [self.string() for _ in range(count)]
        if kind not in _SCALARS:
            raise self.damaged(f"an array with elements of type {kind}")
        dtype = np.dtype(_SCALARS[kind])
        values: list[Any] = np.frombuffer(self.read(count * dtype.itemsize), dtype=dtype).tolist()
        return values

    def tensor(self) -> tuple[tuple[int, ...], int, int, int]:
        """Read (shape in Hugging Face's order, quantisation, bytes of a row, offset from the first tensor's place)."""
        axes = self.number("<I")
        if not 1 <= axes <= 4:
            raise self.damaged(f"a tensor with {axes} dimensions")
        shape = tuple(self.number("<Q") for _ in range(axes))[::-1]
        quantization, offset = self.number("<I"), self.number("<Q")
        block, block_bytes = require("gguf").GGML_QUANT_SIZES.get(quantization, (0, 0))
        if not block or min(shape) < 1 or shape[-1] % block:
            raise self.damaged(f"a tensor of type {quantization} and of shape {list(shape)}, which cannot be")
        return shape, quantization, shape[-1] // block * block_bytes, offset
