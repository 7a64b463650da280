"""A training run, in stages that can be killed and resumed.

1. the model's own continuations of the prompts join the corpus (corpus.py)
2. the units, where they are not given (partition.py), and their bypasses in closed form (closed_form.py)
3. damage regression: the network, from forward passes
   (a training that goes on from a policy takes the results of 2 and 3 from it, and may merge units: merging.py)
4. tuning: bypasses and network together, by KL (losses.py)
5. units that turn out not to pay for their engine are left out, where the search found them (partition.py)
6. the greedy static order, for the static kind of the same bundle (partition.py); a static policy has it before 4

Every batch is drawn from (seed, stage, step), so a resumed training sees the batches of the training that was killed.
Several processes (processes.py) share the passes of the candidates and of stages 2 (closed form), 3 and 4.
"""

import hashlib
import io
import logging
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from dash_export.artifacts import Progress, no_progress, open_regular, write_atomic
from dash_export.decision import Unit
from dash_export.errors import PolicyError
from dash_export.policy import SkipPolicy, Weights, narrowed
from dash_export.train import TrainingSettings
from dash_export.train.closed_form import Sums
from dash_export.train.corpus import OWN, Batch, Corpus
from dash_export.train.losses import regression_loss, static_loss, tuning_loss
from dash_export.train.merging import merged
from dash_export.train.model import GatedModel, SkipModules, always, initial_network, saved
from dash_export.train.partition import (
    Candidate,
    best_partition,
    candidate_groups,
    greedy_order,
    mean_gain,
    static_damage,
    units_that_pay,
    with_dense,
)
from dash_export.train.processes import ALONE, Processes

SAVE_EVERY = 20
"""Steps of regression and tuning between two saves: a kill loses at most so many. Other work begins anew when it is
interrupted: the sums and trials of one group of candidates, the sums of the closed form, the static order.
"""
RANKING_BATCHES = 2
CLOSED_FORM = "bypasses in closed form"
_DIGEST = hashlib.sha256().digest_size
logger = logging.getLogger(__name__)
_T = TypeVar("_T")
Rates = Sequence[tuple[torch.nn.Module, float]]
Loss = Callable[[Batch, np.random.Generator, int], torch.Tensor]


@dataclass(frozen=True)
class Work:
    """State that the stages save in `folder`: tensors and plain values. `key` changes with anything the training
    depends on. State of another training is not used, nor is damaged state, which torch would not notice.
    """

    folder: Path
    key: str
    processes: Processes = ALONE

    def save(self, stage: str, state: Any) -> None:
        """Save the result of a stage, or its progress, of the first process."""
        if self.processes.rank:
            return
        packed = io.BytesIO()  # in memory first: on a full disk torch raises no OSError
        torch.save(state, packed)
        write_atomic(self._path(stage), self._digest(packed.getvalue()) + packed.getvalue())

    def kept(self, stage: str) -> Any:
        """Return what a stage has saved, or None."""
        try:
            with open_regular(self._path(stage)) as file:
                stored = file.read()
        except OSError:
            return None
        if stored[:_DIGEST] != self._digest(stored[_DIGEST:]):
            logger.warning("%s is of another training, or damaged: it is made anew", self._path(stage))
            return None
        # Tensors and plain values only: nothing is unpickled.
        return torch.load(io.BytesIO(stored[_DIGEST:]), map_location="cpu", weights_only=True)

    def once(self, stage: str, make: Callable[[], _T]) -> _T:
        """Return the saved result of a stage; make and save it where there is none. Raises PolicyError where another
        process saves elsewhere.
        """
        made: _T | None = self.kept(stage)
        self.processes.wait()  # all know whether it was there
        if made is None:
            made = make()
            self.save(stage, made)
            self.processes.wait()
            if self.processes.rank:
                made = self.kept(stage)
        if made is None:
            raise PolicyError(
                f"The first process saves in {self.folder}, where this one finds nothing: share the folder."
            )
        return made

    def _digest(self, payload: bytes) -> bytes:
        return hashlib.sha256(self.key.encode() + payload).digest()

    def _path(self, stage: str) -> Path:
        return self.folder / f"{stage}-state.pt"


@dataclass(frozen=True)
class Run:
    """One training: the model that it trains in, the corpus, the settings, and the folder of its work."""

    model: GatedModel
    corpus: Corpus
    settings: TrainingSettings
    work: Work
    progress: Progress = no_progress

    @property
    def processes(self) -> Processes:
        return self.work.processes

    def batch(self, stage: str, step: int) -> tuple[Batch, np.random.Generator]:
        """Return the windows of a step, and the generator for everything else that is random in the step."""
        rng = np.random.default_rng([self.settings.seed, zlib.crc32(stage.encode()), step])
        return self.corpus.batch(rng, self.settings.windows, self.settings.window, self.model.device), rng

    def share(self, stage: str, step: int) -> tuple[Batch, np.random.Generator, float]:
        """Return this process's share of `batch`, a generator of its own, and the weight of the share's mean loss among
        those of all processes: their tokens differ in number.
        """
        (batch, rng), processes = self.batch(stage, step), self.processes
        if processes.count == 1:
            return batch, rng, 1.0
        own = Batch(*(processes.share(part) for part in batch))
        weight = processes.count * float(own.counted.sum() / batch.counted.sum())
        return own, rng.spawn(processes.count)[processes.rank], weight


def trained_policy(
    run: Run, kind: str, units: tuple[Unit, ...] | None, start: SkipPolicy | None
) -> tuple[SkipPolicy, tuple[Candidate, ...]]:
    """Train a policy of `kind`, for these units or for those that a search finds. Return it with the candidates that
    the search chose. `start`: the trained policy that the training goes on from.
    """
    model, settings = run.model, run.settings
    chosen = search_units(run) if units is None else ()
    units = units or tuple(candidate.unit for candidate in chosen)
    if start is None:
        policy = SkipPolicy(units, units[0].first - 1, None, _fitted(run, units))
    else:
        policy = start if start.units == units else _merged(run, start, units)
    if kind == "static":
        policy = replace(policy, network=None)
    elif policy.network is None:
        policy = replace(policy, network=initial_network(len(policy.units), model.spec.hidden_size))
    modules = SkipModules(policy).to(model.device)
    order = _static_order(run, modules) if kind == "static" else ()

    def regression(batch: Batch, rng: np.random.Generator, step: int) -> torch.Tensor:
        return regression_loss(model, modules, settings.trade_offs, batch, rng, step >= settings.warm_up_steps)

    def tuning(batch: Batch, rng: np.random.Generator, _step: int) -> torch.Tensor:
        if kind == "static":
            return static_loss(model, modules, order, batch, rng)
        return tuning_loss(model, modules, settings.trade_offs, batch, rng)

    if kind == "token":
        rates: Rates = [(modules.network, settings.network_rate)]
        _optimise(run, "regression", modules, settings.regression_steps, rates, regression)
    rates = [(modules.bypasses, settings.bypass_rate), (modules.network, settings.refinement_rate)]
    # A policy has seen the batches of the tunings before; its origin tells the last of them from all others.
    stage, drawn = ("further tuning", start.origin) if start else ("tuning", "")
    _optimise(run, stage, modules, settings.tuning_steps, rates, tuning, drawn)
    if chosen and kind == "token":
        modules = SkipModules(_paying(run, modules)).to(model.device)
    return replace(modules.to_policy(), static_order=order or _static_order(run, modules)), chosen


def search_units(run: Run) -> tuple[Candidate, ...]:
    """Return the units to train, as candidates with their figures: each unit that is tried gets a bypass in closed form
    and is skipped alone. Raises PolicyError where none pays.
    """
    model, settings = run.model, run.settings
    windows = with_dense(model, [run.batch("trials", 0)[0]])
    groups = candidate_groups(model.spec.num_layers, settings.search_every)
    tried: list[Candidate] = []
    for number, group in enumerate(groups, 1):

        def damages(group: Sequence[Unit] = group) -> torch.Tensor:
            sums = _summed(run, group, settings.search_steps)
            found = torch.zeros(len(group), sum(int(batch.counted.sum()) for batch, _ in windows))
            for place in run.processes.share(range(len(group))):
                unit = group[place]
                modules = SkipModules(SkipPolicy((unit,), unit.first - 1, None, (sums.fit(unit),))).to(model.device)
                found[place] = static_damage(model, modules, (0,), windows)
                run.progress("candidates", len(tried) + place + 1, sum(map(len, groups)))
            run.processes.add_up([found])
            return found

        for unit, damage in zip(group, run.work.once(f"candidates-{number}", damages), strict=True):
            share = saved(model.spec, len(unit.layers))
            gain = mean_gain(damage.numpy(), share, settings.trade_offs)
            tried.append(Candidate(unit, float(damage.mean()), share, gain))
    best = best_partition(tried, model.spec.num_layers)
    if not best:
        raise PolicyError(
            "Skipping any unit of this model costs more than it saves over these trade-offs: give higher ones "
            "(--trade-offs), or the units (--units)."
        )
    return best


@torch.no_grad()
def _paying(run: Run, modules: SkipModules) -> SkipPolicy:
    """Return the trained policy without the units that gain less than their engines cost."""
    model, found = run.model, list[torch.Tensor]()
    for step in range(RANKING_BATCHES):
        ids, dense, counted = run.batch("ranking", step)[0]
        state = model.rollout(ids, modules, always(len(modules.units), ()), dense).state
        found.append(modules.damage(state)[counted])
    damages = torch.cat(found).cpu().numpy().T
    saved = modules.cost(model.spec).tolist()
    gains = [mean_gain(*one, run.settings.trade_offs) for one in zip(damages, saved, strict=True)]
    kept = units_that_pay(modules.units, gains)
    return narrowed(modules.to_policy(), (layer for place in kept for layer in modules.units[place].layers))


def _fitted(run: Run, units: Sequence[Unit]) -> tuple[Weights, ...]:
    def fit() -> tuple[Weights, ...]:
        sums = _summed(run, units, run.settings.fit_steps, CLOSED_FORM)
        return tuple(sums.fit(unit) for unit in units)

    return _weights_once(run, fit)


def _merged(run: Run, start: SkipPolicy, units: tuple[Unit, ...]) -> SkipPolicy:
    def batches() -> Iterator[Batch]:
        for step in range(run.settings.fit_steps):
            yield run.batch("sums", step)[0]
            run.progress(CLOSED_FORM, step + 1, run.settings.fit_steps)

    network, *bypasses = _weights_once(run, lambda: merged(run.model, start, units, batches()))
    return SkipPolicy(units, start.read, network or None, tuple(bypasses))


def _weights_once(run: Run, fit: Callable[[], Sequence[Weights]]) -> tuple[Weights, ...]:
    def packed() -> list[dict[str, torch.Tensor]]:
        return [{name: torch.from_numpy(array) for name, array in weights.items()} for weights in fit()]

    kept = run.work.once("fit", packed)
    return tuple({name: tensor.numpy() for name, tensor in weights.items()} for weights in kept)


def _summed(run: Run, units: Sequence[Unit], steps: int, name: str = "") -> Sums:
    sums = Sums(run.model, units)
    for step in range(steps):
        sums.add(run.share("sums", step)[0])
        if name:
            run.progress(name, step + 1, steps)
    run.processes.add_up(sums.tensors)
    return sums


def _static_order(run: Run, modules: SkipModules) -> tuple[int, ...]:
    def order() -> list[int]:
        windows = with_dense(run.model, (run.batch("ranking", step)[0] for step in range(RANKING_BATCHES)))
        return [*greedy_order(run.model, modules, windows, run.progress)]

    return tuple(run.work.once("ranking", order))


def _optimise(
    run: Run, stage: str, modules: SkipModules, steps: int, rates: Rates, loss: Loss, drawn: str = ""
) -> None:
    """Run AdamW, clipped per group: a short warm-up, a cosine to a twentieth. `drawn` adds to what draws batches."""
    if not steps:
        return
    rates = [(part, rate) for part, rate in rates if len([*part.parameters()])]
    groups = [{"params": [*part.parameters()], "lr": rate} for part, rate in rates]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)
    done, recent = 0, list[float]()
    if state := run.work.kept(stage):
        done = state["step"]
        modules.load_state_dict(state["modules"])
        optimizer.load_state_dict(state["optimizer"])
    for step in range(done, steps):
        batch, rng, weight = run.share(stage + drawn, step)
        factor = min(1.0, (step + 1) / 10) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group, (_, rate) in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        optimizer.zero_grad()
        value = loss(batch, rng, step)
        (weight * value).backward()  # type: ignore[no-untyped-call]
        run.processes.average_gradients([each for group in optimizer.param_groups for each in group["params"]])
        norms = [torch.nn.utils.clip_grad_norm_(group["params"], 1.0) for group in optimizer.param_groups]
        if not torch.stack([value.detach(), *norms]).isfinite().all():
            raise PolicyError(
                f"The loss of step {step + 1} of the {stage} is not a number: nothing was saved since step "
                f"{step - step % SAVE_EVERY}. Try --precision float32, or other text."
            )
        optimizer.step()
        recent = [*recent[-19:], float(value.detach())]
        run.progress(f"{stage}, loss {np.mean(recent):.3f}", step + 1, steps)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            state = {"step": step + 1, "modules": modules.state_dict(), "optimizer": optimizer.state_dict()}
            run.work.save(stage, state)


def forward_passes(
    settings: TrainingSettings, kind: str, num_layers: int, search: bool, prompts: int
) -> dict[str, float]:
    """Return about how many forward passes over a batch each stage takes, in the order of the stages. The factors are
    the seconds of a stage's step over the seconds of a pass, for SmolLM2-135M in bfloat16 on 2 cores. A KL over a large
    vocabulary takes 3.5 passes there.
    """
    groups = candidate_groups(num_layers, settings.search_every) if search else []
    last = {"tuning": (15.0 if kind == "token" else 20.0) * settings.tuning_steps, "static order": 140.0}
    return {
        OWN: 7.0 * min(prompts, settings.own_prompts),
        "candidates": sum(1.7 * settings.search_steps + 4.5 * len(group) for group in groups),
        CLOSED_FORM: 1.6 * settings.fit_steps,
        "regression": 10.0 * settings.regression_steps if kind == "token" else 0.0,
        **(last if kind == "token" else dict(reversed(last.items()))),
        "held-out text": 70.0 * settings.judged_batches,
    }


def whole_training_progress(progress: Progress, passes: Mapping[str, float]) -> Progress:
    """Return the progress callback of the stages. It tells `progress` the forward passes done of the whole training
    (`passes`: those of each stage), so that the pace says how much time is left.
    """
    total = round(sum(passes.values()))

    def told(name: str, done: int, steps: int) -> None:
        stage = name.partition(",")[0].removeprefix("further ")
        before = sum(list(passes.values())[: list(passes).index(stage)])
        progress(f"{name}, {done} of {steps}", round(before + passes[stage] * done / steps), total)

    return told
