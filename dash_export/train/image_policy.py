"""A policy for an image encoder from unlabelled pictures, in minutes: bypasses by ridge regression, units by
dynamic programming, damage by regression on the pooled state that enters an early layer, and a guard against foreign
pictures.

No gradient is taken and no torch is needed. The course, over the pictures that are not held out:

1. one dense pass gives the sums of which every candidate's bypass is solved;
2. the units are those separate ones, of a wanted number of layers, that cost least divergence, each skipped alone;
3. the bypass of each unit is fitted again on states that the units before it, skipped at random, have changed;
4. every choice of units is run, for every picture: what skipping a unit adds, on average, is its damage;
5. the network predicts the logarithm of damage from the principal components of the pooled state.
"""

from __future__ import annotations

import io
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dash_export import __version__
from dash_export.bundle.layout import PREPROCESSOR
from dash_export.bundle.policy_file import check_replaceable, save_policy
from dash_export.core.input_table import MOST_UNITS, Picture, held_out_text
from dash_export.core.policy import SkipPolicy, Weights
from dash_export.core.units import Unit, check_units, units_text
from dash_export.errors import PolicyError, RequestError
from dash_export.files.artifacts import Progress, content_key, identity, no_progress, write_atomic
from dash_export.files.outputs import locked, output_path, remove_own, work_folder
from dash_export.images.processor import ImageProcessor
from dash_export.models import EncoderCheckpoint, open_model
from dash_export.models.spec import FINAL_NORM
from dash_export.train.image_network import Doubles, fitted_network, pooled_features, predicted, unit_damages
from dash_export.train.image_passes import Floats, ImageModel, Regression, divergence, unit_candidates, unit_normed

SKIPPED = 0.7
"""Share of the batches in which a unit is skipped while the bypasses behind it are fitted."""
SLACK = 1.1
"""Factor of the guard's limits over what the share `own` of the pictures stays below."""
FEWEST = 60
"""Pictures that a training takes at least: a quarter is held out."""


@dataclass(frozen=True)
class ImageSettings:
    """Course of a training. `held_out`: share of the pictures that are only judged on. `searched`: pictures that
    candidates are tried on; `longest`: layers of a candidate; `first`: the first layer that may be skipped; `most`:
    units; `share` of the layers that are in units. `components` of the pooled state that the network reads;
    `own`: share of the model's own pictures that the guard lets through.
    """

    seed: int = 0
    batch: int = 4
    held_out: float = 0.25
    searched: int = 48
    longest: int = 3
    first: int = 3
    most: int = 4
    share: float = 0.67
    components: int = 16
    ridge: float = 0.05
    own: float = 0.99


def train_on_images(
    model: str | Path | EncoderCheckpoint,
    output: str | Path,
    files: Sequence[Path],
    *,
    units: Sequence[Unit] | None = None,
    settings: ImageSettings | None = None,
    progress: Progress = no_progress,
) -> SkipPolicy:
    """Train a policy for an image encoder on pictures and write it to `output` (`.safetensors`, and a JSON card beside
    it). Without `units` a search finds them. A training that was killed goes on where it was. Raises CheckpointError,
    PolicyError and RequestError.
    """
    output, settings = output_path(output), settings or ImageSettings()
    check_replaceable(output)
    opened = open_model(model) if not isinstance(model, EncoderCheckpoint) else model
    if not isinstance(opened, EncoderCheckpoint):
        raise PolicyError(f"{opened.source} is a causal LM, which learns from text: give --text or --prompts.")
    if len(files) < FEWEST:
        raise RequestError(f"These are {len(files)} pictures; a policy needs at least {FEWEST}, better 500.")
    spec = opened.spec
    if units is not None:
        if not 0 < len(units) <= MOST_UNITS:
            raise PolicyError(f"These are {len(units)} units; from 1 to {MOST_UNITS} are learnt about together.")
        check_units(tuple(units), units[0].first - 1, spec.num_layers)
    began, seen = time.perf_counter(), [(path.name, *identity(path)) for path in files]
    key = content_key(asdict(settings), opened.fingerprint, units and units_text(units), seen, __version__)
    with locked(output, "train"), tempfile.TemporaryDirectory() as graphs:
        work = _Work(work_folder(output, "train"), key)
        processor = ImageProcessor.parse(opened.assets[PREPROCESSOR], PREPROCESSOR)
        run = _Run(ImageModel(opened, Path(graphs)), processor, _split(files, settings), settings, work, progress)
        policy, figures = run.policy(None if units is None else tuple(units))
        opened.check_same()
        made = f"trained by dash-export (seed {settings.seed}, key {key[:8]})"
        policy = replace(
            policy.in_half(),
            origin=f"picture policy for {spec.name[:100]}, {made}",
            final_norm=opened.read(FINAL_NORM),
        )
        card = {
            "kind": "token",
            "model": Path(opened.source).name,
            "units": units_text(policy.units),
            "read": policy.read,
            "settings": asdict(settings),
            "pictures": {"learnt": len(run.learnt), "held_out": len(run.held)},
            "held_out": figures,
            "seconds": round(time.perf_counter() - began, 1),
            "versions": {"dash-export": __version__},
        }
        save_policy(output, policy, spec, card)
        remove_own(work.folder)
        return policy


def _split(files: Sequence[Path], settings: ImageSettings) -> tuple[list[Path], list[Path]]:
    """Return the pictures that are learnt from, and the held-out ones."""
    order = np.random.default_rng(settings.seed).permutation(len(files))
    held = round(settings.held_out * len(files))
    return [files[place] for place in order[held:]], [files[place] for place in order[:held]]


def best_units(candidates: Sequence[Unit], lost: Doubles, layers: int, most: int) -> tuple[Unit, ...]:
    """Return at most `most` separate units, of `layers` layers in all or as many as there can be, whose divergences
    when each is skipped alone have the least sum.
    """
    ends = {unit.last for unit in candidates}
    # (units, layers skipped) -> (sum, units), of the units up to a layer.
    known: dict[int, dict[tuple[int, int], tuple[float, tuple[Unit, ...]]]] = {-1: {(0, 0): (0.0, ())}}
    for layer in range(max(ends) + 1):
        here = dict(known[layer - 1])
        for unit, own in zip(candidates, lost.tolist(), strict=True):
            for (count, skipped), (total, units) in known[unit.first - 1].items() if unit.last == layer else ():
                at = (count + 1, skipped + len(unit.layers))
                if count < most and at[1] <= layers and total + own < here.get(at, (np.inf, ()))[0]:
                    here[at] = (total + own, (*units, unit))
        known[layer] = here
    reached = max(skipped for _, skipped in known[max(ends)])
    return min(own for (_, skipped), own in known[max(ends)].items() if skipped == reached)[1]


class _Work:
    """Results of stages on disk, as arrays. Those of another training are not used."""

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self._key = folder, key

    def once(self, stage: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the saved result of a stage; make and save it where there is none."""
        path = self.folder / f"{stage}.npz"
        try:
            with np.load(path, allow_pickle=False) as known:
                if str(known["key"]) == self._key:
                    return {name: known[name] for name in known.files if name != "key"}
        except (OSError, ValueError, KeyError):
            pass
        made, packed = make(), io.BytesIO()
        np.savez(packed, key=np.array(self._key), **made)
        write_atomic(path, packed.getvalue())
        return made


class _Run:
    """One training."""

    def __init__(
        self,
        model: ImageModel,
        processor: ImageProcessor,
        split: tuple[list[Path], list[Path]],
        settings: ImageSettings,
        work: _Work,
        progress: Progress,
    ) -> None:
        self.model, self.spec, self._processor = model, model.spec, processor
        self.learnt, self.held = split
        self.settings, self.work, self._progress = settings, work, progress

    def policy(self, units: tuple[Unit, ...] | None) -> tuple[SkipPolicy, dict[str, Any]]:
        """Run all stages. Return the policy and figures of the held-out pictures."""
        settings = self.settings
        first = min(self.settings.first, self.spec.num_layers - 2)
        candidates = list(units or unit_candidates(self.spec.num_layers, first, self.settings.longest))
        sums = self.work.once("sums", lambda: self._sums(candidates))
        if units is None:
            found = self.work.once("units", lambda: {"units": self._searched(candidates, sums)})["units"]
            units = tuple(Unit(int(a), int(b)) for a, b in found)
        bypasses: list[Weights] = [self._bypass(sums, units[0])]  # nothing lies before it: solved already
        for unit in units[1:]:
            bypasses.append(self._fitted(unit, list(zip(units, bypasses, strict=False))))
        read = units[0].first - 1
        learnt = self.work.once("learnt", lambda: self._table(self.learnt, units, bypasses, read))
        held = self.work.once("held", lambda: self._table(self.held, units, bypasses, read))
        network = fitted_network(
            learnt["features"], unit_damages(learnt["divergence"]), settings.components, settings.ridge
        )
        damage, distance = predicted(network, held["features"])
        own = np.concatenate([distance, predicted(network, learnt["features"])[1]])
        network["limit"] = (SLACK * np.quantile(own, settings.own, axis=0)).astype(np.float32)
        guarded = np.atleast_1d((distance > network["limit"]).any(axis=1))
        order = np.argsort(unit_damages(held["divergence"]).mean(axis=0) / [len(unit.layers) for unit in units])
        pictures = [
            Picture(
                tuple(float(f"{one:.5g}") for one in damage[place]),
                tuple(float(f"{one:.5g}") for one in held["divergence"][place]),
                bool(guarded[place]),
                tuple(map(bool, held["changed"][place])) if held["changed"].size else (),
            )
            for place in range(len(damage))
        ]
        policy = SkipPolicy(
            units, read, network, tuple(bypasses), static_order=tuple(map(int, order)), answers=held_out_text(pictures)
        )
        return policy, {
            "guarded": float(guarded.mean()),
            "divergence_by_choice": held["divergence"].mean(axis=0).round(5).tolist(),
            "correlation": [
                round(float(np.corrcoef(np.log(damage[:, at] + 1e-9), np.log(own_damage + 1e-9))[0, 1]), 3)
                for at, own_damage in enumerate(unit_damages(held["divergence"]).T)
            ],
        }

    def _batches(self, files: Sequence[Path], stage: str) -> Iterator[Floats]:
        size = self.settings.batch
        for start in range(0, len(files), size):
            yield self._processor.batch(files[start : start + size])
            self._progress(stage, min(len(files), start + size), len(files))

    def _sums(self, candidates: Sequence[Unit]) -> dict[str, Any]:
        """Return X'X of what a bypass reads before each first layer, and X'Y of each candidate's update."""
        fits = {unit: Regression(self.spec) for unit in candidates}
        for pixels in self._batches(self.learnt, "the dense pass"):
            entered: dict[int, tuple[Floats, Floats]] = {}
            for layer, state in enumerate(self.model.states(pixels)):
                for unit in candidates:
                    if unit.last == layer - 1:
                        read, before = entered[unit.first]
                        fits[unit].add(read, state - before)
                if any(unit.first == layer for unit in candidates):
                    entered[layer] = (unit_normed(state, self.spec.norm_eps), state)
        solved = {unit: fit.solved() for unit, fit in fits.items()}
        return {f"{unit.name}.{name}": array for unit, own in solved.items() for name, array in own.items()}

    @staticmethod
    def _bypass(sums: dict[str, Any], unit: Unit) -> Weights:
        prefix = f"{unit.name}."
        return {name.removeprefix(prefix): array for name, array in sums.items() if name.startswith(prefix)}

    def _searched(self, candidates: Sequence[Unit], sums: dict[str, Any]) -> npt.NDArray[np.int64]:
        """Return the units [n, 2], first and last layers, in rising order."""
        files = self.learnt[: self.settings.searched]
        lost = np.zeros(len(candidates))
        pixels = [self._processor.batch(files[at : at + 8]) for at in range(0, len(files), 8)]
        for place, batch in enumerate(pixels):
            states = [*self.model.states(batch)]
            dense = self.model.head(states[-1])["pooled"]
            for at, unit in enumerate(candidates):
                state = self.model.skip(states[unit.first], self._bypass(sums, unit))
                state = self.model.layers(state, range(unit.last + 1, self.spec.num_layers))
                lost[at] += divergence(dense, self.model.head(state)["pooled"]).sum() / len(files)
                self._progress("choosing units", place * len(candidates) + at + 1, len(pixels) * len(candidates))
        wanted = round(self.settings.share * self.spec.num_layers)
        chosen = best_units(candidates, lost, wanted, self.settings.most)
        return np.array([[unit.first, unit.last] for unit in chosen], np.int64)

    def _fitted(self, unit: Unit, before: Sequence[tuple[Unit, Weights]]) -> Weights:
        """Return the bypass of a unit, fitted where the units before it are skipped at random. Its aim is the dense
        state behind the unit, so it mends what they did.
        """
        first = before[0][0].first

        def fit() -> dict[str, Any]:
            rng, regression = np.random.default_rng((self.settings.seed, unit.first)), Regression(self.spec)
            for pixels in self._batches(self.learnt, f"the bypass of layers {unit}"):
                layer = first
                state = dense = self.model.layers(self.model.embed(pixels), range(layer))
                for other, bypass in before:
                    state = self.model.layers(state, range(layer, other.first))
                    skips = rng.random() < SKIPPED
                    state = self.model.skip(state, bypass) if skips else self.model.layers(state, other.layers)
                    layer = other.last + 1
                state = self.model.layers(state, range(layer, unit.first))
                dense = self.model.layers(dense, range(first, unit.last + 1))
                regression.add(unit_normed(state, self.spec.norm_eps), dense - state)
            return dict(regression.solved())

        return self.work.once(f"bypass-{unit.name}", fit)

    def _table(
        self, files: Sequence[Path], units: tuple[Unit, ...], bypasses: Sequence[Weights], read: int
    ) -> dict[str, Any]:
        """Run every choice of units. Return `features` [n, features] of the state that enters layer `read`,
        `divergence` [n, choices], and `changed` [n, choices] where the model has a classifier.
        """
        features, lost, changed = [], [], []
        for pixels in self._batches(files, "every choice of units"):
            state = self.model.layers(self.model.embed(pixels), range(read))
            features.append(pooled_features(state, self.spec.special, self.spec.norm_eps))
            ends = self._ends(state, read, 0, 0, units, bypasses)
            found = [ends[choice] for choice in range(2 ** len(units))]
            lost.append(np.stack([divergence(found[0]["pooled"], one["pooled"]) for one in found], axis=1))
            if self.spec.labels:
                classes = np.stack([one["logits"].argmax(axis=1) for one in found], axis=1)
                changed.append(classes != classes[:, :1])
        return {
            "features": np.concatenate(features),
            "divergence": np.maximum(np.concatenate(lost), 0.0),
            "changed": np.concatenate(changed) if changed else np.zeros((len(files), 0), np.bool_),
        }

    def _ends(
        self, state: Floats, layer: int, unit: int, choice: int, units: tuple[Unit, ...], bypasses: Sequence[Weights]
    ) -> dict[int, dict[str, Floats]]:
        """Return what the head gives for every choice of the units from `unit` on; layers that choices share run
        once.
        """
        if unit == len(units):
            found = self.model.head(self.model.layers(state, range(layer, self.spec.num_layers)))
            return {choice: {name: found[name] for name in ("pooled", "logits") if name in found}}
        own = units[unit]
        state = self.model.layers(state, range(layer, own.first))
        runs, skips = self.model.layers(state, own.layers), self.model.skip(state, bypasses[unit])
        following = (own.last + 1, unit + 1)
        return self._ends(runs, *following, choice, units, bypasses) | self._ends(
            skips, *following, choice + 2**unit, units, bypasses
        )
