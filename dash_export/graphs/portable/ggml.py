"""Blocks of a GGUF file in an ONNX graph: each type is a function `ggml.<type>` of standard operators.

A block is codes of a few bits, float16 factors and, in K-quants, 6 or 8 bits of scale per part of the block: weight =
code * scale + least. The functions take the factors [..., blocks, factors] float16 and all other bytes [..., blocks,
bytes] uint8: together the bytes of the file. Formulas: ggml-quants.c.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx.parser
import onnx_ir as ir

from dash_export.graphs.portable.writer import OPSET
from dash_export.models.readers.weights import require
from dash_export.models.spec import Float32Array

DOMAIN = "ggml"


@dataclass(frozen=True)
class Block:
    """One block type: its number of weights, its number of float16 factors, and the sizes of its other fields in bytes.
    The factors come first, except in Q6_K. `zero`: the code that means 0, in a type where that code is fixed.
    """

    weights: int
    factors: int
    fields: tuple[int, ...]
    zero: int = 0

    @property
    def bytes(self) -> int:
        return 2 * self.factors + sum(self.fields)

    @property
    def bits(self) -> float:
        """Bits of a weight, its share of the factors included."""
        return 8 * self.bytes / self.weights


BLOCKS = {
    "Q4_0": Block(32, 1, (16,), 8),
    "Q4_1": Block(32, 2, (16,)),
    "Q5_0": Block(32, 1, (4, 16), 16),
    "Q5_1": Block(32, 2, (4, 16)),
    "Q8_0": Block(32, 1, (32,)),
    "Q4_K": Block(256, 2, (4, 4, 4, 128)),
    "Q5_K": Block(256, 2, (4, 4, 4, 32, 128)),
    "Q6_K": Block(256, 1, (128, 64, 16), 32),
}
_FACTORS_LAST = ("Q6_K",)
FOUR_BITS = ("Q4_0", "Q4_1", "Q4_K")


def split_blocks(kind: str, packed: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.uint8]]:
    """Split rows of a file, uint8 [rows, bytes], into (factors, other bytes) as the functions take them."""
    block = BLOCKS[kind]
    packed = packed.reshape(len(packed), -1, block.bytes)
    cut = sum(block.fields) if kind in _FACTORS_LAST else 2 * block.factors
    parts = [np.ascontiguousarray(part) for part in (packed[..., :cut], packed[..., cut:])]
    factors, others = parts[::-1] if kind in _FACTORS_LAST else parts
    return factors.view(np.float16), others


def dequantized(kind: str, factors: npt.NDArray[np.float16], others: npt.NDArray[np.uint8]) -> Float32Array:
    """Return the weight [rows, columns] by the `gguf` library: bit for bit what the ONNX function gives."""
    gguf, parts = require("gguf"), [factors.view(np.uint8), others]
    packed = np.concatenate(parts[::-1] if kind in _FACTORS_LAST else parts, axis=-1)
    found: Float32Array = gguf.dequantize(packed.reshape(len(packed), -1), gguf.GGMLQuantizationType[kind])
    return found


def four_bits(
    kind: str, factors: npt.NDArray[np.float16], others: npt.NDArray[np.uint8]
) -> tuple[npt.NDArray[np.uint8], Float32Array, Float32Array] | None:
    """Return codes [rows, parts, 32], scales and least weights [rows, parts] of a type in which weight = code * scale +
    least in parts of 32 weights; None for other types.
    """
    if kind not in FOUR_BITS:
        return None
    rows, numbers = len(factors), factors.astype(np.float32)
    packed = others[..., -BLOCKS[kind].weights // 2 :].reshape(rows, -1, 1, 32 if kind == "Q4_K" else 16)
    codes = np.concatenate([packed & np.uint8(15), packed >> np.uint8(4)], axis=2).reshape(rows, -1, 32)
    scales, least = numbers[..., 0], numbers[..., -1]
    if kind == "Q4_0":
        least = np.float32(-BLOCKS[kind].zero) * scales
    if kind == "Q4_K":
        first, second, rest = (others[..., at : at + 4] for at in (0, 4, 8))
        parts = (first, rest & 15), (second, rest >> 4)
        scale, less = (np.concatenate([own & 63, low | own >> 6 << 4], axis=-1) for own, low in parts)
        scales = (numbers[..., :1] * scale).reshape(rows, -1)
        least = -(numbers[..., 1:] * less).reshape(rows, -1)
    return codes, scales, least


def block_function(kind: str) -> ir.Function:
    """Return the ONNX function of a block type: (factors, blocks) -> weight [..., columns] float32."""
    block, k_quant = BLOCKS[kind], kind.endswith("_K")
    lines = [
        "given = Cast <to = 1> (factors)",
        *_rows("numbers", "given", block.factors),
        *_rows("others", "blocks", sum(block.fields)),
        *_split("numbers", ["scale", "least"][: block.factors], [1] * block.factors),
        *_split("others", [f"field{place}" for place in range(len(block.fields))], block.fields),
        *_codes(kind),
        *_parts(kind),
        *_rows("codes", "code", 16 if kind == "Q6_K" else 32),
        *_rows("scales", "own_scale" if k_quant else "scale", 1),
        "product = Mul (codes, scales)",
    ]
    if block.factors == 2:
        lines += _rows("leasts", "own_least" if k_quant else "least", 1)
        lines += [f"sum = {'Sub' if k_quant else 'Add'} (product, leasts)"]
    lines += ["rows = Shape <start = 0, end = -2> (blocks)", "columns = Constant <value_ints = [-1]> ()"]
    lines += ["shape = Concat <axis = 0> (rows, columns)"]
    lines += [f"weight = Reshape ({'sum' if block.factors == 2 else 'product'}, shape)"]
    head = f'<domain: "{DOMAIN}", opset_import: ["" : {OPSET}]>\n{kind} (factors, blocks) => (weight) {{\n'
    made: ir.Function = ir.from_proto(onnx.parser.parse_function(head + "\n".join(lines) + "\n}"))
    return made


def _codes(kind: str) -> list[str]:
    """Return lines that compute `code`, a float: 0 is the weight 0 in a type of one factor, else the least weight."""
    fields = [f"field{place}" for place in range(len(BLOCKS[kind].fields))]
    if kind == "Q8_0":
        return _signed("code", fields[0])
    if kind == "Q6_K":
        lines = [*_bits("low", fields[0], 64, (0, 4), 15), *_bits("high", fields[1], 32, (0, 2, 4, 6), 3)]
    else:
        k_quant = kind.endswith("_K")
        lines = _bits("low", fields[-1], 32 if k_quant else 16, (0, 4), 15)
        if kind.startswith("Q5"):
            lines += _bits("high", fields[-2], 32 if k_quant else 1, range(8), 1)
    if kind.startswith("Q4"):
        lines += ["whole = Identity (low)"]
    else:
        lines += ["sixteen = Constant <value_float = 16.0> ()", "upper = Mul (high, sixteen)"]
        lines += ["whole = Add (low, upper)"]
    return [*lines, f"zero = Constant <value_float = {BLOCKS[kind].zero}.0> ()", "code = Sub (whole, zero)"]


def _parts(kind: str) -> list[str]:
    """Return lines that compute `own_scale` and `own_least` of each part of a K-quant's block; none for other types."""
    if kind == "Q6_K":
        return [*_signed("part", "field2"), "own_scale = Mul (scale, part)"]
    if not kind.endswith("_K"):
        return []
    lines = [*_six_bits("part", "field0", "field2", 0), *_six_bits("less", "field1", "field2", 4)]
    return [*lines, "own_scale = Mul (scale, part)", "own_least = Mul (least, less)"]


def _split(source: str, names: Sequence[str], sizes: Sequence[int]) -> list[str]:
    if len(names) == 1:
        return [f"{names[0]} = Identity ({source})"]
    given = f"{source}_sizes = Constant <value_ints = {list(sizes)}> ()"
    return [given, f"{', '.join(names)} = Split <axis = -1> ({source}, {source}_sizes)"]


def _rows(name: str, source: str, *shape: int) -> list[str]:
    return [f"{name}_shape = Constant <value_ints = {[-1, *shape]}> ()", f"{name} = Reshape ({source}, {name}_shape)"]


def _signed(name: str, source: str) -> list[str]:
    return [f"{name}_int8 = Cast <to = 3> ({source})", f"{name} = Cast <to = 1> ({name}_int8)"]


def _bits(name: str, source: str, width: int, shifts: Sequence[int], mask: int, out: int = 16) -> list[str]:
    """Return lines that unpack bits as floats [groups, out]: of each `width` bytes, those at the first shift first."""
    steps = ", ".join(map(str, shifts))
    return [
        f"{name}_steps = Constant <value = uint8[{len(shifts)}, 1] {{{steps}}}> ()",
        f"{name}_mask = Constant <value = uint8[1] {{{mask}}}> ()",
        *_rows(f"{name}_bytes", source, 1, width),
        f'{name}_moved = BitShift <direction = "RIGHT"> ({name}_bytes, {name}_steps)',
        f"{name}_masked = BitwiseAnd ({name}_moved, {name}_mask)",
        f"{name}_each = Cast <to = 1> ({name}_masked)",
        *_rows(name, f"{name}_each", out),
    ]


def _six_bits(name: str, own: str, rest: str, shift: int) -> list[str]:
    """Return lines for eight 6-bit numbers: four in `own`; of four the upper two bits there, the rest in `rest`."""
    return [
        *_bits(f"{name}_first", own, 4, [0], 63, 4),
        *_bits(f"{name}_low", rest, 4, [shift], 15, 4),
        *_bits(f"{name}_high", own, 4, [6], 3, 4),
        f"{name}_16 = Constant <value_float = 16.0> ()",
        f"{name}_upper = Mul ({name}_high, {name}_16)",
        f"{name}_last = Add ({name}_low, {name}_upper)",
        f"{name} = Concat <axis = -1> ({name}_first, {name}_last)",
    ]
