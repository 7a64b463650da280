"""Find what is odd on a production line: the distance of each patch to the nearest patch of good pictures
(AnomalyDINO, arXiv 2405.14529), which takes all layers; or, with a budget, of the pooled vector to that of the nearest
good picture: who leaves early has no patches.

    python examples/inspect_line.py line.dash GOOD_DIR PICTURE... --budget 0.6

Prints for each picture its score (dense, the mean of its most distant patches, and where the most distant one is) and
the time.
"""

import argparse
from pathlib import Path

import numpy as np

from dash_export import DashRuntime
from dash_export.images.sources import image_files
from dash_export.runtime.encoder import Encoded

MOST_PATCHES, WORST = 20_000, 0.01


def vectors(encoded: Encoded, special: int) -> np.ndarray:
    """Return the patches' states [n, patches, hidden], or the pooled vectors [n, 1, hidden], of unit length."""
    states = encoded.pooled[:, None] if encoded.states is None else encoded.states[:, special:]
    found: np.ndarray = states / np.linalg.norm(states, axis=-1, keepdims=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle")
    parser.add_argument("good", type=Path)
    parser.add_argument("pictures", nargs="+", type=Path)
    parser.add_argument("--budget", type=float)
    given = parser.parse_args()
    runtime = DashRuntime.load(given.bundle)
    model = runtime.bundle.manifest.encoder
    encoder = runtime.encoder(budget=given.budget) if given.budget else runtime.encoder()
    known = np.concatenate([vectors(found, model.special)[0] for found in encoder.stream(image_files(given.good))])
    if len(known) > MOST_PATCHES:
        known = known[np.random.default_rng(0).choice(len(known), MOST_PATCHES, replace=False)]
    columns = model.image_size[1] // model.patch_size
    for path, found in zip(given.pictures, encoder.stream(given.pictures), strict=True):
        distances = 1 - (vectors(found, model.special)[0] @ known.T).max(axis=1)
        worst = np.sort(distances)[-max(1, round(WORST * len(distances))) :]
        row, column = divmod(int(distances.argmax()), columns)
        place = "" if found.states is None else f"most at row {row}, column {column} of the patches; "
        layers = int((found.actions == 0).sum())
        guarded = ", guarded" if found.guarded[0] else ""
        print(f"{path.name}: {worst.mean():.3f}, {place}{layers} layers, {1000 * found.seconds:.0f} ms{guarded}")


if __name__ == "__main__":
    main()
