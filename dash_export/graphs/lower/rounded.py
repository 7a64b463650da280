"""Storage of weight matrices: precision by the recipe (the same for every backend), block size and roundings.

A rounding is decided in calibration, and a lowering takes it instead of its own: int4 codes, or the range of fp8
inputs. A build keeps all roundings in one file, so that the machine that lowers need not be able to calibrate.
"""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED, ZipFile

import numpy as np
import numpy.typing as npt

from dash_export.bundle.recipe import Precision, WeightsRecipe
from dash_export.errors import BundleError
from dash_export.files.artifacts import open_regular

FINEST_FIRST: tuple[Precision, ...] = ("fp32", "fp16", "bf16", "int8", "fp8", "int4")


def weight_precision(node: str, recipe: WeightsRecipe, gated: Collection[int]) -> Precision:
    """Return the precision of a node's weights. A layer's nodes are named `layer_NN/...`, those of a unit's bypass
    `bypass_AA-BB/...`. `gated`: the layers of all units.
    """
    part, _, rest = node.partition("/")
    if part == "head":
        return recipe.head
    if part == "policy" or part.startswith("bypass") or rest.startswith("update_"):
        return recipe.bypass
    precision = recipe.layers if int(part.rsplit("_", 1)[1]) in gated else recipe.ungated
    if rest.startswith(("attention/q_proj", "attention/k_proj", "attention/v_proj")):
        return min(precision, recipe.qkv, key=FINEST_FIRST.index)
    return precision


def block_of(rows: int, wanted: int) -> int | None:
    """Halve `wanted` until it divides the matrix's input size (576 takes 64), down to 64 unless it is smaller itself;
    None if no such size does.
    """
    least = min(wanted, 64)
    while wanted >= least:
        if rows % wanted == 0:
            return wanted
        wanted //= 2
    return None


@dataclass(frozen=True)
class Rounded:
    """Int4 matrix: weight = (code - zero) * scale, with one block per `block` inputs. `codes` [in, out] uint8, `scales`
    [blocks, out] float32, `zeros` [blocks, out] uint8.
    """

    codes: npt.NDArray[np.uint8]
    scales: npt.NDArray[np.float32]
    zeros: npt.NDArray[np.uint8]
    block: int

    def dequantized(self) -> npt.NDArray[np.float32]:
        """Return the weights [in, out] float32."""
        rows = np.arange(len(self.codes)) // self.block
        return (self.codes - self.zeros[rows].astype(np.float32)) * self.scales[rows]

    def check(self, node: str, shape: tuple[int, ...], block: int) -> None:
        """Raise BundleError unless the rounding is of a matrix of `shape` [in, out] in blocks of `block` inputs."""
        if self.codes.shape != shape or self.block != block:
            raise BundleError(f"The rounding that is kept of {node} is not of this matrix. Build the target again.")


Roundings = Callable[[str], Rounded | float | None]
"""Node of a matrix in a portable graph -> its codes or (fp8) the largest absolute input; None: round to nearest."""


def to_nearest(_node: str) -> Rounded | float | None:
    """Return None: every matrix is rounded to nearest."""
    return None


_PARTS = {"codes": np.uint8, "scales": np.float32, "zeros": np.uint8, "form": np.int64}
"""Arrays of an int4 matrix in the file, named `<node>.<part>`. Codes are [in / 2, out], two inputs per byte; `form` is
(inputs, inputs per block). The range of an fp8 input is `<node>.largest`. The file is an .npz: reading it needs only
numpy, which every device has.
"""


def write_roundings(path: Path, key: str, roundings: Iterable[tuple[str, Rounded | float]]) -> None:
    """Write (node, rounding) pairs, int4 matrices and fp8 ranges, one by one, and the `key` of what made them."""
    with ZipFile(path, "w", ZIP_STORED) as file:

        def add(name: str, array: npt.NDArray[Any]) -> None:
            with file.open(f"{name}.npy", "w", force_zip64=True) as out:
                np.lib.format.write_array(out, np.asarray(array, order="C"), allow_pickle=False)

        add("key", np.array(key))
        for node, rounded in roundings:
            if isinstance(rounded, float):
                add(f"{node}.largest", np.array(rounded, np.float32))
                continue
            codes = np.pad(rounded.codes, ((0, len(rounded.codes) % 2), (0, 0)))
            form = np.array([len(rounded.codes), rounded.block])
            parts: list[npt.NDArray[Any]] = [codes[::2] | codes[1::2] << 4, rounded.scales, rounded.zeros, form]
            for part, array in zip(_PARTS, parts, strict=True):
                add(f"{node}.{part}", array)


def roundings_lookup(path: Path) -> Roundings:
    """Return a lookup in a file of roundings; without the file every matrix is rounded to nearest. The lookup of a
    matrix raises BundleError when the file is damaged.
    """

    def rounded(node: str) -> Rounded | float | None:
        if not path.is_file():
            return None
        try:
            with np.load(path) as arrays:
                if f"{node}.largest" in arrays.files:
                    largest = float(_array(arrays, f"{node}.largest", np.float32))
                    if not 0 <= largest < np.inf:
                        raise ValueError(f"the range of {node} is none")
                    return largest
                if f"{node}.codes" not in arrays.files:
                    return None
                packed, scales, zeros, form = (_array(arrays, f"{node}.{part}", kind) for part, kind in _PARTS.items())
            rows, block = map(int, form)
            if len(packed) != -(-rows // 2) or not scales.shape == zeros.shape == (-(-rows // block), packed.shape[1]):
                raise ValueError(f"the parts of {node} do not go together")
            codes = np.stack([packed & 15, packed >> 4], axis=1).reshape(-1, packed.shape[1])[:rows]
            return Rounded(codes, scales, zeros, block)
        except Exception as error:  # numpy and zipfile raise many kinds; the file may be from outside
            raise BundleError(f"{path} is damaged ({error}). Delete it and build again.") from error

    return rounded


def roundings_key(path: Path) -> str:
    """Return the key of what a file was made from; "" for a file that is missing or not a file of roundings."""
    try:
        with open_regular(path) as file, np.load(file) as arrays:
            return str(_array(arrays, "key"))
    except Exception:  # numpy and zipfile raise many kinds
        return ""


def _array(arrays: Any, name: str, kind: Any = None) -> Any:
    """Return an array. Raises ValueError for another type, and if compressed (a tiny file could fill the memory)."""
    if arrays.zip.getinfo(f"{name}.npy").compress_type != ZIP_STORED:
        raise ValueError(f"{name} is compressed")
    array = arrays[name]
    if kind is not None and array.dtype != kind:
        raise ValueError(f"{name} is of another type")
    return array
