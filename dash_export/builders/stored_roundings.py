"""The calibrated rounding of a GPU build, kept beside its engines: the machine that compiles them, from a build kit
say, need not be one that can calibrate, and `--verify` makes the graphs again.
"""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED

import numpy as np

from dash_export.artifacts import content_key, open_regular
from dash_export.builders.segments import Artifact, calibration_key, graphs_key
from dash_export.bundle import Bundle
from dash_export.errors import BundleError
from dash_export.graphs.compose import load_graph
from dash_export.graphs.rounded import Rounded, Roundings, to_nearest
from dash_export.graphs.trt.quantize import MIDDLE
from dash_export.names import ROUNDINGS
from dash_export.targets import Recipe

ROUNDING_REVISION = 1
"""Raised whenever matrices are rounded otherwise, so that files made by an earlier version are not reused."""
NAME, FILE = "roundings", ROUNDINGS
"""`key`, what it was made from; of each matrix `<node>.codes` [in / 2, out] uint8, two inputs a byte, and
`<node>.scales` [blocks, out] float32. In numpy's own form, which needs nothing that a device lacks.
"""


def rounding_artifact(bundle: Bundle, recipe: Recipe, folder: Path, roundings: Roundings) -> Artifact:
    """The file of all matrices that the recipe rounds to int4, as `roundings` says; the one in the build's folder where
    it is of the same, as in a kit.
    """
    key = _key(bundle, recipe)
    return Artifact(NAME, key, partial(_write, bundle, key, roundings, folder), role="aside")


def keep_roundings(bundle: Bundle, recipe: Recipe, roundings: Roundings, folder: Path) -> Roundings:
    """Write the file into `folder`, of a build that is made later, elsewhere, where the recipe asks for it."""
    if not calibration_key(bundle, recipe):
        return to_nearest
    folder.mkdir(parents=True)
    rounding_artifact(bundle, recipe, bundle.path(f"engines/{recipe.name}"), roundings).write(folder)
    return stored_roundings(folder)


def stored_roundings(folder: Path) -> Roundings:
    """What the file in a build's folder says; all are rounded to nearest where there is none. A matrix that is asked
    for raises BundleError where the file is damaged.
    """
    path = folder / FILE

    def rounded(node: str) -> Rounded | None:
        if not path.is_file():
            return None
        try:
            with np.load(path) as arrays:
                if f"{node}.codes" not in arrays.files:
                    return None
                packed, scales = (_array(arrays, f"{node}.{part}") for part in ("codes", "scales"))
            if (packed.dtype, scales.dtype) != (np.uint8, np.float32):
                raise ValueError(f"{node} is of {packed.dtype} and {scales.dtype}")
            codes = np.stack([packed & 15, packed >> 4], axis=1).reshape(-1, packed.shape[1])
            zeros = np.full(scales.shape, MIDDLE, np.uint8)
            return Rounded(codes, scales, zeros, bits=4, block=len(codes) // len(scales))
        except Exception as error:  # numpy and zipfile raise many kinds; the file may be from outside
            raise BundleError(f"{path} is damaged ({error}). Delete it and build again.") from error

    return rounded


def _array(arrays: Any, name: str) -> Any:
    """Raises ValueError for one that is compressed, as none of ours is: a file of nothing can fill the memory."""
    if arrays.zip.getinfo(f"{name}.npy").compress_type != ZIP_STORED:
        raise ValueError(f"{name} is compressed")
    return arrays[name]


def _key(bundle: Bundle, recipe: Recipe) -> str:
    parts = calibration_key(bundle, recipe), graphs_key(bundle, ["head"]), recipe.as_dict()["weights"]
    return content_key(ROUNDING_REVISION, *parts, bundle.manifest.policy.layers)


def _write(bundle: Bundle, key: str, roundings: Roundings, folder: Path, out: Path) -> list[Path]:
    if _key_of(folder / FILE) == key:
        return [Path(shutil.copy(folder / FILE, out))]
    layers = [f"layer_{layer:02d}" for layer in range(bundle.manifest.model.num_layers)]
    nodes = [str(node.name) for name in layers for node in load_graph(bundle.graph(name)).graph]
    arrays: dict[str, Any] = {"key": np.array(key)}
    for node in [*(node for node in nodes if node.endswith("_proj")), "head/logits"]:
        rounded = roundings(node)
        if rounded is not None:
            arrays[f"{node}.codes"] = rounded.codes[::2] | rounded.codes[1::2] << 4
            arrays[f"{node}.scales"] = rounded.scales
    path = out / FILE
    np.savez(path, **arrays)
    return [path]


def _key_of(path: Path) -> str:
    """What a file was made from; nothing of one that is not there or not ours."""
    try:
        with open_regular(path) as file, np.load(file) as arrays:
            return str(_array(arrays, "key"))
    except Exception:  # as above
        return ""
