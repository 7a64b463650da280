"""From a frozen model and text to a trained policy, in stages that can be killed and resumed.

    1. the model's own continuations of the prompts join the corpus
    2. the compensation in closed form, and the cosine ranking (compensation.py)
    3. damage regression: the network, from forward passes (regression.py)
       (a training that goes on from a policy takes both from it, or the first alone)
    4. tuning: compensation and network together, by KL (tuning.py)
    5. the greedy static order, for the static kind of the same bundle (ranking.py)

Every batch is drawn from (seed, stage, step), so a resumed training is the one that was killed.
"""

from __future__ import annotations

import io
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch

from dash_export.artifacts import Progress, content_key, no_progress, write_atomic
from dash_export.errors import PolicyError
from dash_export.policy.compensation import UpdateStatistics
from dash_export.policy.corpus import Batch, Corpus
from dash_export.policy.gated_model import GatedModel
from dash_export.policy.ranking import greedy_order, judged, single_damages
from dash_export.policy.regression import Regression
from dash_export.policy.settings import TrainingSettings
from dash_export.policy.skip_modules import SkipModules, initial_network
from dash_export.policy.tuning import StaticTuning, Tuning
from dash_export.skip_policy import Compensation, SkipPolicy, all_at_once

SAVE_EVERY = 20
RANKING_BATCHES = 2
# What a step of each kind costs, in forward passes of a batch: for an honest estimate of the time left.
REGRESSION_COST, TUNING_COST, FIT_COST = 3, 5, 1
STATE = "state.pt"
LONGEST_NAME = 100


@dataclass
class Training:
    """One training run, for the model called `name`. `folder` holds its checkpoint until it is done. `start`: the
    policy that it goes on from, of the same gated layers, without its network where that is learnt anew; then only what
    comes after is left to do.
    """

    model: GatedModel
    corpus: Corpus
    settings: TrainingSettings
    gated: tuple[int, ...]
    folder: Path
    name: str
    key: str
    start: SkipPolicy | None = None
    progress: Progress = no_progress

    def token_policy(self) -> SkipPolicy:
        """Train network and compensation: stages 2 to 5."""
        settings = self.settings
        self._begin(
            {
                "fit": settings.fit_steps * FIT_COST,
                "regression": settings.regression_steps * REGRESSION_COST,
                "tuning": settings.tuning_steps * TUNING_COST,
                "ranking": len(self.gated) * RANKING_BATCHES * 6,
            }
        )
        start = self._fitted()
        if start.network is None:
            start = replace(start, network=self._initial_network(), reads=self._reads())
        modules = SkipModules(start).to(self.model.device)
        regression = Regression(self.model, modules, settings.trade_offs)
        learning = [(list(modules.network.values()), settings.network_rate)]
        self._optimise(
            "regression",
            modules,
            settings.regression_steps,
            REGRESSION_COST,
            learning,
            lambda batch, rng, step: regression.loss(batch, rng, step >= settings.warm_up_steps),
        )
        tuning = Tuning(self.model, modules, settings.trade_offs)
        both = [
            (list(modules.compensation.values()), settings.compensation_rate),
            (list(modules.network.values()), settings.refinement_rate),
        ]
        self._optimise(
            self._tuning,
            modules,
            settings.tuning_steps,
            TUNING_COST,
            [group for group in both if group[0]],
            lambda batch, rng, _: tuning.loss(batch, rng),
        )
        order = self._ranking(modules)
        return replace(modules.to_policy(self.origin("token")), static_order=order, cosine_order=start.cosine_order)

    def static_policy(self, largest: int) -> SkipPolicy:
        """A policy without a network: the greedy order and a compensation tuned for its first `largest` sets."""
        settings = self.settings
        self._begin(
            {
                "fit": settings.fit_steps * FIT_COST,
                "ranking": len(self.gated) * RANKING_BATCHES * 6,
                "tuning": settings.tuning_steps * TUNING_COST * (settings.compensation != "none"),
            }
        )
        start = replace(self._fitted(), network=None)
        modules = SkipModules(start).to(self.model.device)
        order = self._ranking(modules)
        if settings.compensation != "none":
            tuning = StaticTuning(self.model, modules, order, min(largest, len(order)))
            learning = [(list(modules.compensation.values()), settings.compensation_rate)]
            self._optimise(
                self._tuning,
                modules,
                settings.tuning_steps,
                TUNING_COST,
                learning,
                lambda batch, rng, _: tuning.loss(batch, rng),
            )
        return replace(modules.to_policy(self.origin("static")), static_order=order, cosine_order=start.cosine_order)

    @property
    def _tuning(self) -> str:
        """The stage draws its batches by its name: one that goes on from a policy sees other ones than that did."""
        return "tuning" if self.start is None else "further tuning"

    def origin(self, kind: str) -> str:
        """One line for the manifest."""
        name, seed = self.name[:LONGEST_NAME], self.settings.seed
        return f"{kind} policy for {name}, trained by dash-export (seed {seed}, key {self.key[:8]})"

    def _begin(self, work: dict[str, int]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._total = sum(work.values())
        self._done = 0

    def _advance(self, stage: str, work: int) -> None:
        self._done += work
        self.progress(stage, min(self._done, self._total), self._total)

    def _batches(self, stage: str, count: int) -> Iterator[tuple[Batch, np.random.Generator]]:
        for step in range(count):
            rng = self._rng(stage, step)
            yield self.corpus.batch(rng, self.settings.windows, self.settings.window), rng

    def _rng(self, stage: str, step: int) -> np.random.Generator:
        return np.random.default_rng([self.settings.seed, zlib.crc32(stage.encode()), step])

    def _initial_network(self) -> dict[str, np.ndarray]:
        settings, hidden = self.settings, self.model.spec.hidden_size
        return initial_network(len(self.gated), hidden, settings.width, settings.history, settings.seed)

    def _reads(self) -> tuple[int, ...]:
        return all_at_once(self.gated) if self.settings.decide == "once" else ()

    def _fitted(self) -> SkipPolicy:
        """The compensation in closed form and the cosine order, without a network; or what training goes on from."""
        start, rank = self.start, self.settings.rank
        if start is not None and start.compensation.rank in (0, rank):
            return start
        statistics = UpdateStatistics(self.model, self.gated)
        for batch, _ in self._batches("fit", self.settings.fit_steps):
            statistics.add(batch)
            self._advance("compensation in closed form", FIT_COST)
        if start is not None:
            return replace(start, compensation=statistics.low_rank(rank, start.compensation))
        kind = self.settings.compensation
        fitted = (
            statistics.low_rank(rank)
            if kind == "low_rank"
            else statistics.scale()
            if kind == "scale"
            else Compensation()
        )
        return SkipPolicy(self.gated, None, fitted, cosine_order=statistics.cosine_order())

    def _ranking(self, modules: SkipModules) -> tuple[int, ...]:
        windows = judged(self.model, (batch for batch, _ in self._batches("ranking", RANKING_BATCHES)))
        done = self._done
        share = len(self.gated) * RANKING_BATCHES * 3

        def progress(name: str, part: int, parts: int) -> None:
            offset = share if name == "static order" else 0
            self._done = done + offset + share * part // parts
            self._advance(name, 0)

        singles = single_damages(self.model, modules, windows, progress)
        order = greedy_order(self.model, modules, windows, singles, progress)
        self._done = done + 2 * share
        return order

    def _optimise(
        self,
        stage: str,
        modules: SkipModules,
        steps: int,
        cost: int,
        learning: Sequence[tuple[list[torch.nn.Parameter], float]],
        loss: Callable[[Batch, np.random.Generator, int], torch.Tensor],
    ) -> None:
        """AdamW with a short warm-up and a cosine to a twentieth, clipped per group; saves every SAVE_EVERY steps."""
        if not steps:
            return
        groups = [{"params": parameters, "lr": rate} for parameters, rate in learning]
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)
        first = self._restore(stage, modules, optimizer)
        self._advance(stage, first * cost)
        recent: list[float] = []
        for step in range(first, steps):
            rng = self._rng(stage, step)
            batch = self.corpus.batch(rng, self.settings.windows, self.settings.window)
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
            self._advance(f"{stage} {step + 1}/{steps}, loss {np.mean(recent):.3f}", cost)
            if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
                self._save(stage, step + 1, modules, optimizer)

    def _save(self, stage: str, step: int, modules: SkipModules, optimizer: torch.optim.Optimizer) -> None:
        state = {
            "key": self.key,
            "stage": stage,
            "step": step,
            "modules": modules.state_dict(),
            "optimizer": optimizer.state_dict(),
        }
        packed = io.BytesIO()  # torch's own error for a full disk is none of Python's
        torch.save(state, packed)
        write_atomic(self.folder / f"{stage}-{STATE}", packed.getvalue())

    def _restore(self, stage: str, modules: SkipModules, optimizer: torch.optim.Optimizer) -> int:
        """How many steps of the stage are done; what they made is loaded."""
        path = self.folder / f"{stage}-{STATE}"
        if not path.is_file():
            return 0
        try:
            # Tensors and plain values only: nothing is unpickled.
            state = torch.load(path, map_location=self.model.device, weights_only=True)
            if state["key"] != self.key:
                return 0
            optimizer.load_state_dict(state["optimizer"])
            modules.load_state_dict(state["modules"])
            return int(state["step"])
        except (OSError, RuntimeError, KeyError, ValueError, TypeError, EOFError, UnpicklingError):
            return 0  # cut short or not ours: this stage begins anew


def training_key(settings: TrainingSettings, *parts: object) -> str:
    """Changes with anything a training depends on."""
    return content_key(1, asdict(settings), torch.__version__, *parts)
