"""The calibrated rounding of a GPU build, kept beside its engines: the machine that compiles them, from a build kit
say, need not be one that can calibrate, and `--verify` makes the graphs again.
"""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from dash_export.artifacts import ArtifactStore, content_key
from dash_export.builders.segments import Artifact, calibration_key, weights_key
from dash_export.bundle import Bundle
from dash_export.errors import BundleError
from dash_export.graphs.compose import load_graph
from dash_export.graphs.rounded import Rounded, Roundings, to_nearest
from dash_export.graphs.trt.quantize import MIDDLE
from dash_export.targets import Recipe

NAME = "roundings"
FILE = f"{NAME}.npz"
"""Of each matrix `<node>.codes` [in / 2, out] uint8, two inputs a byte, and `<node>.scales` [blocks, out] float32. In
numpy's own form, which needs nothing that a device lacks.
"""


def rounding_artifact(bundle: Bundle, recipe: Recipe, roundings: Roundings) -> Artifact:
    """The file of all matrices that the recipe rounds to int4, as `roundings` says."""
    key = content_key(calibration_key(bundle, recipe), weights_key(recipe), bundle.manifest.policy.gated)
    return Artifact(NAME, key, partial(_write, bundle, roundings), engine=False)


def keep_roundings(bundle: Bundle, recipe: Recipe, roundings: Roundings, folder: Path) -> Roundings:
    """Write the file into the folder of a build that is made later, elsewhere, where the recipe asks for it."""
    if not calibration_key(bundle, recipe):
        return to_nearest
    artifact = rounding_artifact(bundle, recipe, roundings)
    ArtifactStore(folder).make(artifact.name, artifact.key, artifact.write)
    return stored_roundings(folder)


def stored_roundings(folder: Path) -> Roundings:
    """What the file in a build's folder says, when a matrix is asked for: all are rounded to nearest where there is
    none. Raises BundleError then where it is damaged.
    """

    @cache
    def names() -> frozenset[str]:
        path = folder / FILE
        if not path.is_file():
            return frozenset()
        with np.load(path) as arrays:
            return frozenset(arrays.files)

    def rounded(node: str) -> Rounded | None:
        node = node.replace("skip_", "layer_", 1)  # a skip graph writes the K and V that its layer writes
        try:
            if f"{node}.codes" not in names():
                return None
            with np.load(folder / FILE) as arrays:
                packed, scales = arrays[f"{node}.codes"], arrays[f"{node}.scales"]
            codes = np.stack([packed & 15, packed >> 4], axis=1).reshape(-1, packed.shape[1])
            zeros = np.full(scales.shape, MIDDLE, np.uint8)
            return Rounded(codes, scales, zeros, bits=4, block=len(codes) // len(scales))
        except Exception as error:  # numpy and zipfile raise many kinds; the file may be from outside
            raise BundleError(f"{folder / FILE} is damaged ({error}). Delete it and build again.") from error

    return rounded


def _write(bundle: Bundle, roundings: Roundings, out: Path) -> list[Path]:
    layers = [f"layer_{layer:02d}" for layer in range(bundle.manifest.model.num_layers)]
    nodes = [str(node.name) for name in layers for node in load_graph(bundle.graph(name)).graph]
    arrays: dict[str, Any] = {}
    for node in [*(node for node in nodes if node.endswith("_proj")), "head/logits"]:
        rounded = roundings(node)
        if rounded is not None:
            arrays[f"{node}.codes"] = rounded.codes[::2] | rounded.codes[1::2] << 4
            arrays[f"{node}.scales"] = rounded.scales
    path = out / FILE
    np.savez(path, **arrays)
    return [path]
