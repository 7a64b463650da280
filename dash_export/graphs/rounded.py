"""A matrix as integers on a grid, decided elsewhere: what a lowering takes instead of rounding by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Rounded:
    """`codes` [in, out] uint8, `scales` [blocks, out] float32, `zeros` [blocks, out] uint8, one block per `block`
    inputs: weight = (code - zero) * scale.
    """

    codes: npt.NDArray[np.uint8]
    scales: npt.NDArray[np.float32]
    zeros: npt.NDArray[np.uint8]
    bits: int
    block: int

    def dequantized(self) -> npt.NDArray[np.float32]:
        """[in, out] float32."""
        rows = np.arange(len(self.codes)) // self.block
        return (self.codes - self.zeros[rows].astype(np.float32)) * self.scales[rows]


Roundings = Callable[[str], Rounded | None]
"""By the name of a matrix's node in a layer's portable graph; None: to be rounded to nearest."""


def to_nearest(_node: str) -> Rounded | None:
    """No matrix has a rounding of its own."""
    return None


def scaled(roundings: Roundings, factors: Mapping[str, float]) -> Roundings:
    """The same for matrices that have been multiplied: the codes stay, the grid is stretched."""

    def stretched(node: str) -> Rounded | None:
        rounded = roundings(node)
        if rounded is None or node not in factors:
            return rounded
        return replace(rounded, scales=rounded.scales * np.float32(factors[node]))

    return stretched
