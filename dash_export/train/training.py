"""From a frozen model and text to a trained policy, in stages that can be killed and resumed.

1. the model's own continuations of the prompts join the corpus
2. the units, where they are not given (search.py), and their bypasses in closed form (closed_form.py)
3. damage regression: the network, from forward passes (regression.py)
   (a training that goes on from a policy takes all that from it)
4. tuning: bypasses and network together, by KL (tuning.py)
5. the greedy static order, for the static kind of the same bundle (ranking.py)
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from dash_export.artifacts import content_key
from dash_export.decision import Unit
from dash_export.errors import PolicyError
from dash_export.policy import SkipPolicy, default_units
from dash_export.train.corpus import Batch
from dash_export.train.partition import Candidate
from dash_export.train.ranking import greedy_order, judged, ranking_work
from dash_export.train.regression import Regression
from dash_export.train.run import SAVE_EVERY, Run
from dash_export.train.search import SUM_COST, TRIAL_COST, search_units, search_work, summed
from dash_export.train.settings import TrainingSettings
from dash_export.train.skip_modules import SkipModules, initial_network
from dash_export.train.tuning import StaticTuning, Tuning

RANKING_BATCHES = 2
REGRESSION_COST, TUNING_COST = 3, 3
"""What a step costs, in forward passes of a batch: for an honest estimate of the time left."""


@dataclass
class Training:
    """A run that trains `units`, or without them those of a search, which leaves what it chose them by in `chosen`.
    `start`: the policy that it goes on from; then only what comes after the regression is left to do.
    """

    run: Run
    units: tuple[Unit, ...] | None
    start: SkipPolicy | None = None
    chosen: tuple[Candidate, ...] = ()

    def token_policy(self) -> SkipPolicy:
        """Train network and bypasses: stages 2 to 5."""
        model, settings = self.run.model, self.run.settings
        self._begin(settings.regression_steps)
        policy = self._fitted()
        if policy.network is None:
            policy = replace(policy, network=initial_network(len(policy.units), model.spec.hidden_size))
        modules = SkipModules(policy).to(model.device)
        regression = Regression(model, modules, settings.trade_offs)
        self._optimise(
            "regression",
            modules,
            settings.regression_steps,
            REGRESSION_COST,
            [(modules.network, settings.network_rate)],
            lambda batch, rng, step: regression.loss(batch, rng, step >= settings.warm_up_steps),
        )
        self._tune(modules, Tuning(model, modules, settings.trade_offs))
        return replace(modules.to_policy(), static_order=self._ranking(modules))

    def static_policy(self) -> SkipPolicy:
        """A policy without a network: the greedy order and bypasses tuned for its first sets."""
        self._begin(0)
        modules = SkipModules(replace(self._fitted(), network=None)).to(self.run.model.device)
        order = self._ranking(modules)
        self._tune(modules, StaticTuning(self.run.model, modules, order))
        return replace(modules.to_policy(), static_order=order)

    def _begin(self, regression_steps: int) -> None:
        run, settings, spec = self.run, self.run.settings, self.run.model.spec
        run.folder.mkdir(parents=True, exist_ok=True)
        work = regression_steps * REGRESSION_COST + settings.tuning_steps * TUNING_COST
        if self.start is None:
            work += settings.fit_steps * SUM_COST
            work += 0 if self.units else search_work(spec, settings.search_steps)
        expected = len(self.units or default_units(spec.num_layers))  # how many a search finds is not known
        self._ranking_work = ranking_work(expected) * RANKING_BATCHES * TRIAL_COST
        run.total, run.done = work + self._ranking_work, 0

    def _fitted(self) -> SkipPolicy:
        """Bypasses in closed form, without a network; or what training goes on from."""
        run = self.run
        if self.start is not None:
            return self.start
        if self.units is None:
            self.chosen = search_units(run)
            self.units = tuple(candidate.unit for candidate in self.chosen)
        sums = summed(run, "fit", "bypasses in closed form", self.units, run.settings.fit_steps)
        return SkipPolicy(self.units, self.units[0].first - 1, None, tuple(map(sums.fit, self.units)))

    def _ranking(self, modules: SkipModules) -> tuple[int, ...]:
        run, order = self.run, []
        if run.restore("ranking", lambda state: order.extend(state["order"])):
            run.advance("static order", self._ranking_work)
            return tuple(order)
        windows = judged(run.model, (run.batch("ranking", step)[0] for step in range(RANKING_BATCHES)))
        before = run.done

        def progress(name: str, part: int, parts: int) -> None:
            run.done = before + self._ranking_work * part // parts
            run.advance(name, 0)

        order = list(greedy_order(run.model, modules, windows, progress))
        run.save("ranking", len(order), order=order)
        return tuple(order)

    def _tune(self, modules: SkipModules, tuning: Tuning | StaticTuning) -> None:
        """A run that goes on from a policy sees other batches than that did: they are drawn by the stage's name."""
        settings = self.run.settings
        stage = "tuning" if self.start is None else "further tuning"
        learning = [(modules.bypasses, settings.bypass_rate), (modules.network, settings.refinement_rate)]
        self._optimise(
            stage,
            modules,
            settings.tuning_steps,
            TUNING_COST,
            learning,
            lambda batch, rng, _: tuning.loss(batch, rng),
        )

    def _optimise(
        self,
        stage: str,
        modules: SkipModules,
        steps: int,
        cost: int,
        learning: Sequence[tuple[torch.nn.Module, float]],
        loss: Callable[[Batch, np.random.Generator, int], torch.Tensor],
    ) -> None:
        """AdamW with a short warm-up and a cosine to a twentieth, clipped per group; saves every SAVE_EVERY steps."""
        if not steps:
            return
        run = self.run
        learning = [(part, rate) for part, rate in learning if len([*part.parameters()])]
        groups = [{"params": [*part.parameters()], "lr": rate} for part, rate in learning]
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)

        def load(state: dict[str, Any]) -> None:
            copy.deepcopy(modules).load_state_dict(state["modules"])  # all or nothing: what does not fit takes a part
            optimizer.load_state_dict(state["optimizer"])
            modules.load_state_dict(state["modules"])

        first = run.restore(stage, load)
        run.advance(stage, first * cost)
        recent: list[float] = []
        for step in range(first, steps):
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
            run.advance(f"{stage} {step + 1}/{steps}, loss {np.mean(recent):.3f}", cost)
            if run.due(step, steps):
                run.save(stage, step + 1, modules=modules.state_dict(), optimizer=optimizer.state_dict())


def training_key(settings: TrainingSettings, *parts: object) -> str:
    """Changes with anything a training depends on."""
    return content_key(2, asdict(settings), torch.__version__, *parts)
