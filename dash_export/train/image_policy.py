"""A policy for an image encoder from unlabelled pictures, in minutes: exits, what predicts the damage of leaving at
one, and a guard against foreign pictures (`core/exits.py` has the formulas).

One dense pass over the pictures keeps a few pooled vectors of each layer. All else is ridge regression on these: no
gradient is taken and no torch is needed. A share of the pictures is only judged on; the dial is made of these.
"""

from __future__ import annotations

import io
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from dash_export import __version__
from dash_export.bundle.layout import PREPROCESSOR
from dash_export.bundle.policy_file import check_replaceable, save_policy
from dash_export.core.advice import policy_command
from dash_export.core.exits import check_exits
from dash_export.core.input_table import Picture, held_out_text
from dash_export.core.policy import SkipPolicy, Weights, half
from dash_export.core.units import Unit, check_units, units_text
from dash_export.errors import PolicyError, RequestError
from dash_export.files.artifacts import Progress, content_key, identity, no_progress, write_atomic
from dash_export.files.outputs import locked, output_path, remove_own, work_folder
from dash_export.images.processor import ImageProcessor
from dash_export.models import EncoderCheckpoint, open_model
from dash_export.models.spec import FINAL_NORM
from dash_export.train import image_exits
from dash_export.train.image_passes import Floats, ImageModel, divergence

SLACK = 1.1
"""Factor of the guard's limits over what the share `own` of the pictures stays below."""
FEWEST = 60
"""Pictures that a training takes at least: a quarter is held out."""
CHUNK = 50
"""Pictures after which a killed training goes on."""


@dataclass(frozen=True)
class ImageSettings:
    """Course of a training. `held_out`: share of the pictures that are only judged on. `before`: share of the layers
    before the first exit; `most`: exits. `components` that the guard reads; `own`: share of own pictures that it lets
    through.
    """

    seed: int = 0
    batch: int = 4
    held_out: float = 0.25
    before: float = 0.25
    most: int = 8
    components: int = 16
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
    it). `units` follow each other up to the last layer: there is an exit before each. A training that was killed goes
    on where it was. Raises CheckpointError, PolicyError and RequestError.
    """
    output, settings = output_path(output), settings or ImageSettings()
    check_replaceable(output)
    opened = open_model(model) if not isinstance(model, EncoderCheckpoint) else model
    if not isinstance(opened, EncoderCheckpoint):
        raise PolicyError(f"{opened.source} is a causal LM, which learns from text: give --text or --prompts.")
    if opened.spec.takes != "pictures":
        raise PolicyError(f"{opened.source} takes no pictures. {policy_command(opened.spec, opened.source)}")
    if len(files) < FEWEST:
        raise RequestError(f"These are {len(files)} pictures; a policy needs at least {FEWEST}, better 500.")
    spec = opened.spec
    chosen = tuple(units or exit_units(spec.num_layers, settings.before, settings.most))
    check_units(chosen, chosen[0].first - 1, spec.num_layers)
    check_exits(chosen, spec.num_layers)
    began, seen = time.perf_counter(), [(path.name, *identity(path)) for path in files]
    key = content_key(asdict(settings), opened.fingerprint, units_text(chosen), seen, __version__)
    order = [files[place] for place in np.random.default_rng(settings.seed).permutation(len(files))]
    held = round(settings.held_out * len(files))
    with locked(output, "train"), tempfile.TemporaryDirectory() as graphs:
        work = _Work(work_folder(output, "train"), key)
        processor = ImageProcessor.parse(opened.assets[PREPROCESSOR], PREPROCESSOR)
        run = _Run(ImageModel(opened, Path(graphs)), processor, order[held:], order[:held], settings, work, progress)
        policy, figures = run.policy(chosen)
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


def exit_units(num_layers: int, before: float, most: int) -> tuple[Unit, ...]:
    """Return units, at most `most`, that follow each other up to the last layer; the last has two layers or more."""
    first = max(1, round(before * num_layers))
    firsts = range(first, max(first + 1, num_layers - 1), max(1, -(-(num_layers - 1 - first) // most)))
    return tuple(Unit(a, b - 1) for a, b in pairwise([*firsts, num_layers]))


class _Work:
    """Results of stages on disk, as arrays. Those of another training are not used."""

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self._key = folder, key

    def once(self, stage: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
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


@dataclass
class _Run:
    model: ImageModel
    processor: ImageProcessor
    learnt: list[Path]
    held: list[Path]
    settings: ImageSettings
    work: _Work
    progress: Progress

    def policy(self, units: tuple[Unit, ...]) -> tuple[SkipPolicy, dict[str, Any]]:
        read, hidden, layers = units[0].first - 1, self.model.spec.hidden_size, self.model.spec.num_layers
        learnt, held = (
            self._pooled(files, name, units) for name, files in (("learnt", self.learnt), ("held", self.held))
        )
        dense = learnt["ends"][:, :hidden]
        self.progress("fitting exits", 0, 1 + len(units))
        early, unseen = image_exits.fitted_exit(learnt[f"read-{read}"], dense, hidden)
        bypasses, answers = list[Weights](), [unseen]
        for place, unit in enumerate(units, 1):
            self.progress("fitting exits", place, 1 + len(units))
            bypass, unseen = image_exits.fitted_exit(learnt[f"read-{unit.first}"], learnt["ends"], hidden)
            bypasses.append(bypass)
            answers.append(unseen)
        centre = dense.mean(axis=0)
        weight, bias = image_exits.fitted_scores(answers, dense, centre)
        network = {f"early.{name}": half(array) for name, array in early.items()}
        network |= {"centre": centre, "weight": weight, "bias": bias}
        guard = image_exits.fitted_guard(learnt["guard"], self.settings.components)
        distance = image_exits.distances(guard, held["guard"])
        own = np.concatenate([distance, image_exits.distances(guard, learnt["guard"])])
        guard["limit"] = (SLACK * np.quantile(own, self.settings.own, axis=0)).astype(np.float32)
        guarded = np.atleast_1d((distance > guard["limit"]).any(axis=1))
        reads = {unit.first: held[f"read-{unit.first}"] for unit in units}
        damage, found = image_exits.answered(network, bypasses, reads, held[f"read-{read}"], units, layers)
        lost = np.stack([divergence(held["ends"][:, :hidden], each[:, :hidden]) for each in found], axis=1)
        classes = [each[:, hidden:].argmax(axis=1) for each in (held["ends"], *found)] if self.model.spec.labels else []
        pictures = [
            Picture(
                tuple(float(f"{one:.5g}") for one in damage[:, place]),
                tuple(float(f"{max(one, 0):.5g}") for one in lost[place]),
                bool(guarded[place]),
                tuple(bool(each[place] != classes[0][place]) for each in classes[1:]),
            )
            for place in range(len(lost))
        ]
        order = tuple(range(len(units)))[::-1]
        policy = SkipPolicy(units, read, network | guard, tuple(bypasses), static_order=order,
                            answers=held_out_text(pictures))  # fmt: skip
        return policy, {
            "guarded": float(guarded.mean()),
            "exits": [
                {"before": unit.first, "divergence": round(float(lost[:, at].mean()), 5),
                 "worst": round(float(lost[:, at].max()), 5)}
                for at, unit in enumerate(units)
            ],
        }  # fmt: skip

    def _pooled(self, files: Sequence[Path], name: str, units: Sequence[Unit]) -> dict[str, Floats]:
        """Return what exits read (`read-LAYER`), what the `guard` reads, and the `ends`, each [n, ...]."""
        starts = range(0, len(files), CHUNK)
        parts = [
            self.work.once(
                f"{name}-{start}", partial(self._chunk, files[start : start + CHUNK], start, len(files), units)
            )
            for start in starts
        ]
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}

    def _chunk(self, files: Sequence[Path], done: int, total: int, units: Sequence[Unit]) -> dict[str, Floats]:
        found: dict[str, list[Floats]] = defaultdict(list)
        given, read, size = (self.model.spec.special, self.model.spec.norm_eps), units[0].first - 1, self.settings.batch
        for start in range(0, len(files), size):
            for layer, state in enumerate(self.model.states(self.processor.batch(files[start : start + size]))):
                if layer == read or any(unit.first == layer for unit in units):
                    found[f"read-{layer}"].append(image_exits.exit_read(state, *given))
                if layer == read:
                    found["guard"].append(image_exits.guard_read(state, *given))
            head = self.model.head(state)
            found["ends"].append(np.concatenate([head[name] for name in ("pooled", "logits") if name in head], axis=1))
            self.progress("the dense pass", done + min(len(files), start + size), total)
        return {name: np.concatenate(parts) for name, parts in found.items()}
