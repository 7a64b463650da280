"""Damage to files, drawn from a random generator: to their bytes, and to what their format says."""

import json
import random
import re
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import onnx

NUMBERS = [0, 1, -1, 2, 3, 7, 127, 128, 255, 256, 1 << 15, (1 << 16) - 1, 1 << 20, (1 << 31) - 1, 1 << 31, -(1 << 31)]
NUMBERS += [(1 << 32) - 1, 1 << 32, 1 << 53, (1 << 63) - 1, 1 << 63, -(1 << 63), (1 << 64) - 1, 10**30]
DEEP, LONG = "@deep@", "@long@"
"""Stand for what json.dumps cannot write: a nest of 3,000, and a number of 5,000 digits."""
VALUES: list[Any] = [None, True, False, *NUMBERS, 0.5, -0.0, 1e308, float("nan"), float("inf"), DEEP, LONG, "", "x"]
VALUES += ["../x", "/etc/passwd", "a\0b", "\ud800", "\x1b[2J", "x" * 70_000, [], [[]], ["x"], [1, 1], {}, {"a": 1}]
Mutator = Callable[[random.Random, bytes, Sequence[bytes]], bytes]
"""(generator, one seed, all seeds) -> damaged bytes. May raise where the seed is none of its format any more."""


def damaged(rng: random.Random, seeds: Sequence[bytes], of_format: Mutator) -> bytes:
    """One to four damages to one of the seeds, in its bytes or in its format."""
    data = rng.choice(seeds)
    for _ in range(rng.choice([1, 1, 2, 4])):
        try:
            data = of_format(rng, data, seeds) if rng.random() < 0.7 else in_bytes(rng, data, seeds)
        except Exception:  # an earlier damage left nothing of the format
            data = in_bytes(rng, data, seeds)
    return data


def in_bytes(rng: random.Random, data: bytes, seeds: Sequence[bytes]) -> bytes:
    """Bits, cuts, splices, numbers and blocks."""
    changed, size = bytearray(data), len(data)
    # Half of all damage is near the beginning, where formats say what is to come.
    at = rng.randrange(min(size, 256) + 1) if rng.random() < 0.5 else rng.randrange(size + 1)
    length = min(rng.choice([1, 2, 4, 8, 16, 100, 1000]), size - at)
    block = data[at : at + length]
    match rng.randrange(8):
        case 0:
            for _ in range(rng.randrange(1, 9)):
                if size:
                    changed[rng.randrange(size)] ^= 1 << rng.randrange(8)
        case 1:
            del changed[at:]
        case 2:
            del changed[at : at + length]
        case 3:
            changed[at : at + length] = block * rng.choice([2, 3, 50])
        case 4:
            width = rng.choice([1, 2, 4, 8])
            number = rng.choice(NUMBERS) % (1 << 8 * width)
            changed[at : at + width * rng.randrange(2)] = number.to_bytes(width, rng.choice(["little", "big"]))
        case 5:
            other = rng.choice(seeds)
            start = rng.randrange(len(other) + 1)
            changed[at : at + length] = other[start : start + rng.choice([1, 16, 1000, len(other)])]
        case 6:
            changed[at:at] = rng.randbytes(length)
        case 7:
            changed[at:at] = rng.choice([b"\0", b"\xff", b'"', b"{", b"[", b"\\", b"\n", b"e", b"-"]) * rng.choice(
                [1, 40, 3000]
            )
    return bytes(changed)


def _places(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a JSON document."""
    yield path
    for key, value in data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ():
        yield from _places(value, (*path, key))


def changed_json(rng: random.Random, data: Any, values: Sequence[Any] = VALUES) -> Any:
    """The document with one value replaced, removed, repeated, renamed or exchanged for one from elsewhere."""
    paths = list(_places(data))
    *above, last = rng.choice(paths) or [None]
    if last is None:
        return rng.choice(values)
    parent = data
    for key in above:
        parent = parent[key]
    elsewhere = data
    for key in rng.choice(paths):
        elsewhere = elsewhere[key]
    match rng.randrange(8):
        case 0:
            del parent[last]
        case 1 if isinstance(parent, dict):
            parent[str(rng.choice(values))] = parent.pop(last)
        case 1 if parent:
            parent += parent * rng.choice([1, 100])
        case 2:
            parent[last] = json.loads(json.dumps(elsewhere))
        case 3 if isinstance(parent[last], (int, float)):
            parent[last] += rng.choice([1, -1, 0.5])
        case 4 if isinstance(parent[last], str):
            parent[last] = in_text(rng, parent[last].encode(), [b"_-/. 0"]).decode(errors="replace")
        case _:
            parent[last] = rng.choice(values)
    return data


def _dumped(data: Any) -> bytes:
    text = json.dumps(data)
    return text.replace(f'"{DEEP}"', "[" * 3000 + "]" * 3000).replace(f'"{LONG}"', "9" * 5000).encode()


def in_json(rng: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    return _dumped(changed_json(rng, json.loads(data)))


def in_picture(rng: random.Random, data: bytes, seeds: Sequence[bytes]) -> bytes:
    """A chunk of a PNG, whose checksum is made right; any bytes of the other kinds."""
    if not data.startswith(b"\x89PNG"):
        return in_bytes(rng, data, seeds)
    chunks, at = [], 8
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
        at += 12 + size
    which = rng.randrange(len(chunks))
    tag, inner = chunks[which]
    if tag == b"IDAT" and rng.random() < 0.5:
        inner = zlib.compress(in_bytes(rng, zlib.decompress(inner), seeds))
    else:
        inner = in_bytes(rng, inner, seeds)
    chunks[which] = (tag, inner)
    if rng.random() < 0.2:
        chunks.insert(rng.randrange(len(chunks)), rng.choice(chunks))
    parts = [
        struct.pack(">I", len(each)) + tag + each + struct.pack(">I", zlib.crc32(tag + each)) for tag, each in chunks
    ]
    return data[:8] + b"".join(parts)


WORDS = ["9" * 5000, "0x" + "f" * 5000, "[" * 3000 + "]" * 3000, "{a = " * 3000 + "1" + "}" * 3000, "a." * 3000, "\n"]
WORDS += ["true", "null", "nan", "1e999", "1979-05-27", "''", '"int4"', "[1, 'a', [2]]", "[[weights]]", "[engine]"]
WORDS += list(map(str, NUMBERS))


def in_text(rng: random.Random, data: bytes, seeds: Sequence[bytes]) -> bytes:
    """Words of a text (a template, a recipe, lines of JSON) removed, repeated, put elsewhere or replaced."""
    words = re.findall(rb"\w+|\s+|[^\w\s]+", data) or [b""]
    at = rng.randrange(len(words))
    other = re.findall(rb"\w+|\s+|[^\w\s]+", rng.choice(seeds)) or [b""]
    words[at : at + rng.randrange(3)] = [rng.choice([rng.choice(other), b"", rng.choice(WORDS).encode()])]
    return b"".join(words)


def in_safetensors(rng: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    """The header's values (in the metadata: those of the JSON that is a text there), its length, the data."""
    size = 8 + int.from_bytes(data[:8], "little")
    header, rest = json.loads(data[8:size]), bytearray(data[size:])
    metadata = header.get("__metadata__", {})
    match rng.randrange(6):
        case 0 if metadata:
            key = rng.choice(list(metadata))
            metadata[key] = _dumped(changed_json(rng, json.loads(metadata[key]))).decode()
        case 1:
            rest = rest[: rng.randrange(len(rest) + 1)] + rng.randbytes(rng.choice([0, 0, 1, 4, 64]))
        case 2 if len(rest) > 4:
            at = 4 * rng.randrange(len(rest) // 4)
            rest[at : at + 4] = struct.pack("<f", rng.choice([float("nan"), float("inf"), 1e38, -0.0, 1e-40]))
        case _:
            header = changed_json(
                rng, header, [*VALUES, *("F64", "F32", "F16", "BF16", "I32", "F8_E4M3", "BOOL", "C64")]
            )
    text = _dumped(header)
    length = rng.choice(NUMBERS) % (1 << 64) if rng.random() < 0.05 else len(text)
    return length.to_bytes(8, "little") + text + rest


def in_gguf(rng: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    """A count, length, type, size or offset of the header, known by the zeros it ends with; or as much more or less of
    data.
    """
    changed = bytearray(data)
    if rng.random() < 0.2:
        return bytes(changed[: -rng.choice([1, 4, 32, 100])] if rng.random() < 0.5 else changed + bytes(32))
    numbers = list(re.finditer(rb"[^\0][\0-\xff]?\0{2}", data[: data.rindex(b".weight") + 64]))
    at, width = rng.choice(numbers).start(), rng.choice([4, 8])
    old = int.from_bytes(data[at : at + width], "little")
    new = rng.choice([rng.choice(NUMBERS), old + rng.choice([1, -1, 3, 32, -32]), rng.randrange(40)])
    changed[at : at + width] = (new % (1 << 8 * width)).to_bytes(width, "little")
    return bytes(changed)


def in_onnx(rng: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    """A node, an attribute, a name, a type, a shape, or where external data lies."""
    model = onnx.load_model_from_string(data)
    graph = model.graph
    node, tensor = rng.choice(graph.node), rng.choice(graph.initializer)
    edge = rng.choice([*graph.input, *graph.output])
    names = [name for each in graph.node for name in (*each.input, *each.output)]
    match rng.randrange(12):
        case 0:
            graph.node.remove(node)
        case 1:
            graph.node.insert(rng.randrange(len(graph.node)), node)
        case 2:
            node.op_type = rng.choice(
                [rng.choice(graph.node).op_type, "Identity", "Loop", "Reshape", "Expand", "Tile", ""]
            )
        case 3 if node.input:
            node.input[rng.randrange(len(node.input))] = rng.choice([*names, ""])
        case 4 if node.output:
            node.output[rng.randrange(len(node.output))] = rng.choice(names)
        case 5 if node.attribute:
            attribute = rng.choice(node.attribute)
            attribute.i, attribute.type = rng.choice(NUMBERS) % (1 << 63), rng.choice([attribute.type, 1, 2, 4, 7])
        case 6 if tensor.dims:
            tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice(NUMBERS) % (1 << 63) * rng.choice([1, 1, -1])
        case 7:
            tensor.data_type = rng.randrange(25)
        case 8 if tensor.external_data:
            rng.choice(tensor.external_data).value = str(rng.choice([*NUMBERS, "../x", "", "embed.data", "/dev/zero"]))
        case 9:
            tensor.raw_data = tensor.raw_data[: rng.randrange(len(tensor.raw_data) + 1)]
        case 10:
            edge.name = rng.choice([*names, "", "x"])
        case 11 if edge.type.tensor_type.shape.dim:
            edge.type.tensor_type.elem_type = rng.choice([edge.type.tensor_type.elem_type, rng.randrange(25)])
            rng.choice(edge.type.tensor_type.shape.dim).dim_value = rng.choice(NUMBERS) % (1 << 63)
    return model.SerializeToString()
