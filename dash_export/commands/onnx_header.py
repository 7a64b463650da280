"""The opset of an .onnx file without the onnx package: a device that only runs engines can still inspect its bundle.

ModelProto (onnx.proto): field 7 is the graph, field 8 a repeated OperatorSetIdProto {1: domain, 2: version}.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

from dash_export.artifacts import open_regular

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_OPSET_IMPORT = 8
_LONGEST = 1 << 16


def opsets(path: Path) -> dict[str, int]:
    """Domain ("" is ONNX's own) -> version. Raises ValueError for what is not an ONNX file, OSError for no file."""
    found = {}
    with open_regular(path) as file:
        end = os.fstat(file.fileno()).st_size
        while file.tell() < end:
            tag = _varint(file)
            kind = tag & 7
            if kind == _VARINT:
                _varint(file)
            elif kind in (_FIXED64, _FIXED32):
                file.seek(8 if kind == _FIXED64 else 4, 1)
            elif kind == _BYTES:
                length = _varint(file)
                if tag >> 3 == _OPSET_IMPORT and length < _LONGEST:
                    domain, version = _opset(file, file.tell() + length)
                    found[domain] = version
                else:
                    file.seek(length, 1)
            else:
                raise ValueError(f"{path.name} is not an ONNX file")
    return found


def _opset(file: BinaryIO, end: int) -> tuple[str, int]:
    domain, version = "", 0
    while file.tell() < end:
        tag = _varint(file)
        if tag & 7 == _BYTES:
            text = file.read(min(_varint(file), _LONGEST))
            domain = text.decode("utf-8") if tag >> 3 == 1 else domain
        elif tag & 7 == _VARINT:
            value = _varint(file)
            version = value if tag >> 3 == 2 else version
        else:
            raise ValueError("not an ONNX opset")
    return domain, version


def _varint(file: BinaryIO) -> int:
    value = 0
    for shift in range(0, 70, 7):
        byte = file.read(1)
        if not byte:
            break
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return value
    raise ValueError("not an ONNX file: cut short")
