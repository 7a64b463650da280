"""A training run, in stages that can be killed and resumed.

1. the model's own continuations of the prompts join the corpus (corpus.py)
2. the units, where they are not given (partition.py), and their bypasses in closed form (closed_form.py)
3. damage regression: the network, from forward passes
   (a training that goes on from a policy takes all that from it)
4. tuning: bypasses and network together, by KL (losses.py)
5. the greedy static order, for the static kind of the same bundle (partition.py)

Every batch is drawn from (seed, stage, step), so a resumed training is the one that was killed.
"""

from __future__ import annotations

import copy
import hashlib
import io
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from dash_export.artifacts import Progress, no_progress, write_atomic
from dash_export.decision import Unit
from dash_export.errors import PolicyError
from dash_export.policy import Bypass, SkipPolicy
from dash_export.train.closed_form import Sums
from dash_export.train.corpus import Batch, Corpus
from dash_export.train.defaults import TrainingSettings
from dash_export.train.losses import regression_loss, static_loss, tuning_loss
from dash_export.train.model import GatedModel, SkipModules, initial_network
from dash_export.train.partition import (
    Candidate,
    best_partition,
    candidate_groups,
    greedy_order,
    judged,
    skipped_alone,
)

SAVE_EVERY = 20
"""Steps of regression and tuning: a kill costs as many at most. What else a kill interrupts begins anew: the sums and
trials of one group of candidates, the bypasses in closed form, the static order.
"""
RANKING_BATCHES = 2
_DIGEST = hashlib.sha256().digest_size
"""Bytes of the SHA-256 that a file begins with."""
_T = TypeVar("_T")
Loss = Callable[[Batch, np.random.Generator, int], torch.Tensor]


@dataclass(frozen=True)
class Work:
    """The states that stages keep in `folder`. `key` changes with anything the training depends on: what another one
    left there is not taken.
    """

    folder: Path
    key: str

    def save(self, stage: str, **state: Any) -> None:
        """Keep what a stage made: tensors and plain values."""
        packed = io.BytesIO()  # torch's own error for a full disk is none of Python's
        torch.save({"key": self.key, **state}, packed)
        payload = packed.getvalue()
        write_atomic(self._path(stage), hashlib.sha256(payload).digest() + payload)

    def restore(self, stage: str, load: Callable[[dict[str, Any]], _T]) -> _T | None:
        """`load` of what a stage kept; None where that is nothing, damaged, or fails to load."""
        try:
            stored = self._path(stage).read_bytes()
            payload = stored[_DIGEST:]  # in which torch would not notice damage
            if hashlib.sha256(payload).digest() != stored[:_DIGEST]:
                return None
            # Tensors and plain values only: nothing is unpickled.
            state = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
            return load(state) if state["key"] == self.key else None
        except Exception:  # torch raises many kinds
            return None  # not ours, or of another version: this stage begins anew

    def once(self, stage: str, make: Callable[[], _T]) -> _T:
        """What a stage made, tensors and plain values; made now where it is not kept."""
        kept = self.restore(stage, lambda state: (state["made"],))
        if kept is None:
            kept = (make(),)
            self.save(stage, made=kept[0])
        return kept[0]

    def _path(self, stage: str) -> Path:
        return self.folder / f"{stage}-state.pt"


@dataclass(frozen=True)
class Run:
    """One training: what it trains in and on, and where it keeps its work."""

    model: GatedModel
    corpus: Corpus
    settings: TrainingSettings
    work: Work
    progress: Progress = no_progress

    def batch(self, stage: str, step: int) -> tuple[Batch, np.random.Generator]:
        """A step's windows, and the generator that what else is random in it comes from."""
        rng = np.random.default_rng([self.settings.seed, zlib.crc32(stage.encode()), step])
        return self.corpus.batch(rng, self.settings.windows, self.settings.window), rng


def trained_policy(
    run: Run, kind: str, units: tuple[Unit, ...] | None, start: SkipPolicy | None
) -> tuple[SkipPolicy, tuple[Candidate, ...]]:
    """The policy of `kind`, of these units or of those of a search, and what that chose them by. `start`: the trained
    policy that it goes on from.
    """
    chosen = search_units(run) if units is None else ()
    policy = start or fitted_policy(run, units or tuple(candidate.unit for candidate in chosen))
    stages = token_policy if kind == "token" else static_policy
    return stages(run, policy, start is not None), chosen


def token_policy(run: Run, policy: SkipPolicy, further: bool) -> SkipPolicy:
    """Train network and bypasses. `further`: the policy is a trained one, whose regression is done."""
    model, settings = run.model, run.settings
    if policy.network is None:
        policy = replace(policy, network=initial_network(len(policy.units), model.spec.hidden_size))
    modules = SkipModules(policy).to(model.device)

    def regression(batch: Batch, rng: np.random.Generator, step: int) -> torch.Tensor:
        return regression_loss(model, modules, settings.trade_offs, batch, rng, step >= settings.warm_up_steps)

    def tuning(batch: Batch, rng: np.random.Generator, _step: int) -> torch.Tensor:
        return tuning_loss(model, modules, settings.trade_offs, batch, rng)

    learning = [(modules.network, settings.network_rate)]
    _optimise(run, "regression", modules, settings.regression_steps, learning, regression)
    _tune(run, modules, tuning, further)
    return replace(modules.to_policy(), static_order=_static_order(run, modules))


def static_policy(run: Run, policy: SkipPolicy, further: bool) -> SkipPolicy:
    """A policy without a network: the greedy order, and bypasses tuned for its first sets."""
    modules = SkipModules(replace(policy, network=None)).to(run.model.device)
    order = _static_order(run, modules)

    def tuning(batch: Batch, rng: np.random.Generator, _step: int) -> torch.Tensor:
        return static_loss(run.model, modules, order, batch, rng)

    _tune(run, modules, tuning, further)
    return replace(modules.to_policy(), static_order=order)


def search_units(run: Run) -> tuple[Candidate, ...]:
    """The units to train, with what they were chosen by. Raises PolicyError where none pays."""
    windows = judged(run.model, [run.batch("trials", 0)[0]])
    settings, spec = run.settings, run.model.spec
    tried: list[Candidate] = []
    groups = candidate_groups(spec)
    for number, group in enumerate(groups, 1):

        def trials(group: Sequence[Unit] = group, name: str = f"{number}/{len(groups)}") -> list[tuple[float, ...]]:
            sums = _summed(run, f"candidates in closed form {name}", group, settings.search_steps)
            found = skipped_alone(run.model, sums, windows, settings.trade_offs, run.progress)
            return [(own.damage, own.saved, own.gain) for own in found]

        rows = run.work.once(f"candidates-{number}", trials)
        tried += [Candidate(unit, *row) for unit, row in zip(group, rows, strict=True)]
    best = best_partition(tried, spec.num_layers)
    if not best:
        raise PolicyError(
            "Skipping any unit of this model costs more than it saves over these trade-offs: give higher ones "
            "(--trade-offs), or the units (--units)."
        )
    return best


def fitted_policy(run: Run, units: tuple[Unit, ...]) -> SkipPolicy:
    """Bypasses in closed form, without a network."""

    def fit() -> list[dict[str, torch.Tensor]]:
        sums = _summed(run, "bypasses in closed form", units, run.settings.fit_steps)
        return [
            {name: torch.from_numpy(array) for name, array in sums.fit(unit).weights.items()} for unit in sums.units
        ]

    kept = run.work.once("fit", fit)
    bypasses = tuple(Bypass({name: tensor.numpy() for name, tensor in weights.items()}) for weights in kept)
    return SkipPolicy(units, units[0].first - 1, None, bypasses)


def _summed(run: Run, name: str, units: Sequence[Unit], steps: int) -> Sums:
    sums = Sums(run.model, units)
    for step in range(steps):
        sums.add(run.batch("sums", step)[0])
        run.progress(name, step + 1, steps)
    return sums


def _static_order(run: Run, modules: SkipModules) -> tuple[int, ...]:
    def order() -> list[int]:
        windows = judged(run.model, (run.batch("ranking", step)[0] for step in range(RANKING_BATCHES)))
        return [*greedy_order(run.model, modules, windows, run.progress)]

    return tuple(run.work.once("ranking", order))


def _tune(run: Run, modules: SkipModules, loss: Loss, further: bool) -> None:
    """Tune bypasses and network. A run that goes on from a policy sees other batches than that did: they are drawn by
    the stage's name.
    """
    stage, settings = "further tuning" if further else "tuning", run.settings
    learning = [(modules.bypasses, settings.bypass_rate), (modules.network, settings.refinement_rate)]
    _optimise(run, stage, modules, settings.tuning_steps, learning, loss)


def _optimise(
    run: Run,
    stage: str,
    modules: SkipModules,
    steps: int,
    learning: Sequence[tuple[torch.nn.Module, float]],
    loss: Loss,
) -> None:
    """AdamW with a short warm-up and a cosine to a twentieth, clipped per group; saves every SAVE_EVERY steps."""
    if not steps:
        return
    learning = [(part, rate) for part, rate in learning if len([*part.parameters()])]
    groups = [{"params": [*part.parameters()], "lr": rate} for part, rate in learning]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)

    def load(state: dict[str, Any]) -> int:
        copy.deepcopy(modules).load_state_dict(state["modules"])  # all or nothing: what does not fit takes a part
        optimizer.load_state_dict(state["optimizer"])
        modules.load_state_dict(state["modules"])
        return int(state["step"])

    recent: list[float] = []
    for step in range(run.work.restore(stage, load) or 0, steps):
        batch, rng = run.batch(stage, step)
        factor = min(1.0, (step + 1) / 10) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group, (_, rate) in zip(optimizer.param_groups, learning, strict=True):
            group["lr"] = rate * factor
        optimizer.zero_grad()
        value = loss(batch, rng, step)
        if not torch.isfinite(value):
            raise PolicyError(
                f"The loss of step {step + 1} of the {stage} is not a number: nothing was saved since step "
                f"{step - step % SAVE_EVERY}. Try --precision float32, or other text."
            )
        value.backward()  # type: ignore[no-untyped-call]
        for group in optimizer.param_groups:
            torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
        optimizer.step()
        recent = [*recent[-19:], float(value.detach())]
        run.progress(f"{stage}, loss {np.mean(recent):.3f}", step + 1, steps)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            run.work.save(stage, step=step + 1, modules=modules.state_dict(), optimizer=optimizer.state_dict())
