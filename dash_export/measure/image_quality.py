"""Cost of skipping for an image encoder, and the time it saves on the clock, on a folder of pictures.

Settings run in turns on each picture. Where there is a folder for each class, a linear classifier and the nearest
neighbours are fitted on dense vectors of one half of the pictures and judged on the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dash_export.core.exits import gap, normalized
from dash_export.core.kinds import Setting
from dash_export.errors import RequestError
from dash_export.files.artifacts import Progress, no_progress
from dash_export.images.sources import image_files
from dash_export.measure.candidates import Candidate
from dash_export.measure.intervals import interval
from dash_export.runtime import DashRuntime
from dash_export.runtime.encoder import Encoded

Floats = npt.NDArray[np.float32]
NEIGHBOURS = 5
RIDGE = 1e-2
"""Ridge of the linear classifier, relative to the mean square of its inputs."""
WARM_UP = 3


@dataclass(frozen=True)
class ImageQuality:
    """Figures of one setting over so many `pictures`, against dense. `time`: of dense, on the clock, and as `predicted`
    by the cost table; `cosine` of the pooled vectors: mean, and the `worst`; `layers` run, mean; `guarded`: share held
    back. With classes, on every other picture: `agreement` of the linear classifier with itself on dense vectors,
    `accuracy` of it and of the `neighbours`, the shares that it `lost` (right on dense vectors, wrong on these) and
    `won`; with the model's own classifier, `same_class`. `intervals`: bounds of the 95 % confidence intervals of the
    means, over the pictures that were judged.
    """

    setting: Setting
    pictures: int
    time: float
    predicted: float
    layers: float
    cosine: float
    worst: float
    guarded: float
    same_class: float | None = None
    agreement: float | None = None
    accuracy: float | None = None
    lost: float | None = None
    won: float | None = None
    neighbours: float | None = None
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        given = {name: getattr(self.setting, name) for name in self.setting.given}
        apart = ("setting", "intervals")
        own = {name: value for name, value in vars(self).items() if name not in apart and value is not None}
        bounds = {name: [round(bound, 6) for bound in each] for name, each in self.intervals.items()}
        rounded = {name: round(value, 6) for name, value in own.items()}
        return {"policy": self.setting.kind, **given} | rounded | {"intervals": bounds}


def image_quality(
    runtime: DashRuntime,
    folder: Path,
    settings: Sequence[Setting],
    limit: int = 0,
    progress: Progress = no_progress,
    labelled: bool = False,
) -> list[ImageQuality]:
    """Measure dense and the `settings` on the pictures in `folder`, or on `limit` drawn ones. Raises RequestError where
    there is none, or, if `labelled`, no folder for each of several classes; PolicyError for a setting that cannot be
    given.
    """
    if runtime.bundle.manifest.model.takes != "pictures":
        raise RequestError(f"{runtime.bundle.name} takes no pictures: give the bundle of an encoder that does.")
    files = image_files(folder)
    order = np.random.default_rng(0).permutation(len(files))[: limit or None]
    files = [files[place] for place in order]
    classes = [path.relative_to(folder).parts[0] if path.parent != folder else "" for path in files]
    if labelled:
        _check_classes(folder, classes)
    given = [Setting("dense"), *settings]
    encoders = [runtime.encoder_with(setting) for setting in given]
    found: list[list[Encoded]] = [[] for _ in given]
    for place, path in enumerate(files):
        pixels = encoders[0].processor.batch([path])
        for _ in range(WARM_UP if place == 0 else 0):
            for encoder in encoders:
                encoder.encode(pixels)
        turn = place % len(given)
        for at in (*range(turn, len(given)), *range(turn)):
            found[at].append(replace(encoders[at].encode(pixels), states=None))
        progress("encoding", place + 1, len(files))

    def joined(at: int, name: str) -> npt.NDArray[Any]:
        return np.concatenate([getattr(one, name) for one in found[at]])

    seconds = [sum(one.seconds for one in each) for each in found]
    vectors = [joined(at, "pooled").astype(np.float64) for at in range(len(given))]
    judge, rows = _Judge(vectors[0], classes) if len(set(classes)) > 1 else None, list[ImageQuality]()
    for at, setting in enumerate(given):
        cosines, same = 1 - gap(vectors[0], vectors[at]), None
        if found[0][0].probabilities is not None:
            likeliest, dense = (joined(each, "probabilities").argmax(axis=1) for each in (at, 0))
            same = float((likeliest == dense).mean())
        pictures, layers, predicted = Candidate(runtime, setting).taken(joined(at, "actions"))
        figures = (seconds[at] / seconds[0], predicted, layers, float(cosines.mean()), float(cosines.min()))
        guarded = float(joined(at, "guarded").mean())
        each = judge.figures(vectors[at]) if judge is not None else {}
        own = {name: float(values.mean()) for name, values in each.items()}
        judged = {name: interval(values) for name, values in (each | {"cosine": cosines}).items()}
        bounds = {name: (one.low, one.high) for name, one in judged.items()}
        rows.append(ImageQuality(setting, pictures, *figures, guarded, same, **own, intervals=bounds))
    return rows


def image_report(runtime: DashRuntime, folder: Path, limit: int, rows: Sequence[ImageQuality]) -> dict[str, Any]:
    return {
        "bundle": runtime.bundle.name,
        "model": runtime.bundle.manifest.model.name,
        "target": runtime.build.target,
        "device": runtime.build.device,
        "pictures": folder.name,
        "limit": limit,
        "points": [row.record() for row in rows],
    }


def _check_classes(folder: Path, classes: Sequence[str]) -> None:
    expected = "Give a folder that holds one for each class, at least two, with the pictures of the class in it."
    if "" in classes:
        raise RequestError(f"{classes.count('')} pictures lie in {folder} itself, in no class. {expected}")
    if len(set(classes)) < 2:
        raise RequestError(f"The {len(classes)} pictures in {folder} are all of one class, {classes[0]}. {expected}")


class _Judge:
    """A linear classifier (ridge) and the nearest neighbours, of every other picture; judged on the others."""

    def __init__(self, dense: npt.NDArray[np.float64], classes: Sequence[str]) -> None:
        names = sorted(set(classes))
        self._classes = np.array([names.index(name) for name in classes])
        self._learnt = np.arange(len(classes)) % 2 == 0
        x, y = self._with_ones(dense[self._learnt]), np.eye(len(names))[self._classes[self._learnt]]
        ridge = RIDGE * (x * x).mean() * len(x) * np.eye(x.shape[1])
        self._weight = np.linalg.solve(x.T @ x + ridge, x.T @ y)
        self._known = normalized(dense[self._learnt])
        self._dense = self._linear(dense[~self._learnt])

    @staticmethod
    def _with_ones(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return np.concatenate([x, np.ones((len(x), 1))], axis=1)

    def _linear(self, vectors: npt.NDArray[np.float64]) -> npt.NDArray[np.intp]:
        found: npt.NDArray[np.intp] = (self._with_ones(vectors) @ self._weight).argmax(axis=1)
        return found

    def figures(self, vectors: npt.NDArray[np.float64]) -> dict[str, npt.NDArray[np.bool_]]:
        """Return which of the judged pictures count, for each figure that is a share of them."""
        judged, truth = vectors[~self._learnt], self._classes[~self._learnt]
        found = self._linear(judged)
        near = np.argsort(-(judged @ self._known.T), axis=1)[:, :NEIGHBOURS]
        votes = self._classes[self._learnt][near]
        voted = np.array([np.bincount(row).argmax() for row in votes])
        right, before = found == truth, self._dense == truth
        told = {"agreement": found == self._dense, "accuracy": right, "neighbours": voted == truth}
        return told | {"lost": before & ~right, "won": right & ~before}
