"""How a weight matrix is stored: its precision by the recipe, the same for every backend; its blocks; and, of int4, a
rounding decided elsewhere, which a lowering takes instead of its own. A build keeps all of these in one file, so that
the machine that lowers need not be one that can calibrate.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED, ZipFile

import numpy as np
import numpy.typing as npt

from dash_export.artifacts import open_regular
from dash_export.errors import BundleError
from dash_export.targets import Precision, WeightsRecipe

FINEST_FIRST: tuple[Precision, ...] = ("fp32", "fp16", "bf16", "int8", "fp8", "int4")
SMALLEST_BLOCK = 16


def weight_precision(node: str, recipe: WeightsRecipe, gated: Collection[int]) -> Precision:
    """The precision of a node's weights; a layer's nodes are named `layer_NN/...`, a unit's bypass `bypass_AA-BB/...`.
    `gated`: the layers of all units.
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
    """`wanted` halved until it divides the matrix's input size (576 takes 64), None where nothing down to 16 does."""
    while wanted >= SMALLEST_BLOCK:
        if rows % wanted == 0:
            return wanted
        wanted //= 2
    return None


@dataclass(frozen=True)
class Rounded:
    """`codes` [in, out] uint8, `scales` [blocks, out] float32, `zeros` [blocks, out] uint8, one block per `block`
    inputs: weight = (code - zero) * scale.
    """

    codes: npt.NDArray[np.uint8]
    scales: npt.NDArray[np.float32]
    zeros: npt.NDArray[np.uint8]
    block: int

    def dequantized(self) -> npt.NDArray[np.float32]:
        """[in, out] float32."""
        rows = np.arange(len(self.codes)) // self.block
        return (self.codes - self.zeros[rows].astype(np.float32)) * self.scales[rows]

    def check(self, node: str, shape: tuple[int, ...], block: int) -> None:
        """Raises BundleError where this is not of a matrix of that `shape` [in, out], in such blocks."""
        if self.codes.shape != shape or self.block != block:
            raise BundleError(f"The rounding that is kept of {node} is not of this matrix. Build the target again.")


Roundings = Callable[[str], Rounded | float | None]
"""By the name of a matrix's node in a layer's portable graph: its codes, or (fp8) the largest number it was fed; None:
to be rounded to nearest.
"""


def to_nearest(_node: str) -> Rounded | float | None:
    """No matrix has a rounding of its own."""
    return None


_PARTS = {"codes": np.uint8, "scales": np.float32, "zeros": np.uint8, "form": np.int64}
"""Parts of a matrix, `<node>.<part>`: codes [in / 2, out], two inputs a byte; `form`: inputs, and inputs of a block. Of
what it is fed, `<node>.largest`. In numpy's own form, which needs nothing that a device lacks.
"""


def write_roundings(path: Path, key: str, roundings: Iterable[tuple[str, Rounded | float]]) -> None:
    """Write int4 matrices and fp8 ranges given as (node, rounding), one after the other, and the `key` of what they
    follow from.
    """
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


def stored_roundings(path: Path) -> Roundings:
    """Read a file of roundings; all are rounded to nearest where there is none. A matrix that is asked for raises
    BundleError where the file is damaged.
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
    """Key of what a file was made from; nothing of one that is not there or not ours."""
    try:
        with open_regular(path) as file, np.load(file) as arrays:
            return str(_array(arrays, "key"))
    except Exception:  # as above
        return ""


def _array(arrays: Any, name: str, kind: Any = None) -> Any:
    """Raises ValueError for one that is compressed, as none of ours is: a file of nothing can fill the memory."""
    if arrays.zip.getinfo(f"{name}.npy").compress_type != ZIP_STORED:
        raise ValueError(f"{name} is compressed")
    array = arrays[name]
    if kind is not None and array.dtype != kind:
        raise ValueError(f"{name} is of another type")
    return array
