"""A training run, in stages that can be killed and resumed.

1. the model's own continuations of the prompts join the corpus (corpus.py)
2. the units, where they are not given (partition.py), and their bypasses in closed form (closed_form.py)
3. damage regression: the network, from forward passes
   (a training that goes on from a policy takes the results of 2 and 3 from it)
4. tuning: bypasses and network together, by KL (losses.py)
5. units that turn out not to pay for their engine are left out, where they were not given (partition.py)
6. the greedy static order, for the static kind of the same bundle (partition.py); a static policy has it before 4

Every batch is drawn from (seed, stage, step), so a resumed training sees the batches of the training that was killed.
Several processes (processes.py) share the passes of the candidates and of stages 2 (closed form), 3 and 4.
"""

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from dash_export.core.policy import SkipPolicy, Weights, narrowed
from dash_export.core.units import Unit
from dash_export.errors import PolicyError
from dash_export.files.artifacts import Progress, no_progress
from dash_export.train import TrainingSettings, partition
from dash_export.train.closed_form import Sums
from dash_export.train.corpus import Batch, Corpus
from dash_export.train.losses import regression_loss, static_loss, tuning_loss
from dash_export.train.model import GatedModel, SkipModules, always, initial_network, rows_at_once, saved
from dash_export.train.processes import Processes
from dash_export.train.work import Work

TRIAL = 3
"""Time of skipping a candidate on the windows of the search, in steps of its sums."""
RANKING_BATCHES = 2
CLOSED_FORM = "bypasses in closed form"
Rates = Sequence[tuple[torch.nn.Module, float]]
Loss = Callable[[Batch, np.random.Generator, int], torch.Tensor]


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
) -> tuple[SkipPolicy, tuple[partition.Candidate, ...]]:
    """Train a policy for these units, or those of a search, whose candidates are returned. `start`: it goes on."""
    model, settings = run.model, run.settings
    given, chosen = units is not None, search_units(run) if units is None and settings.search_steps else ()
    units = units or tuple(candidate.unit for candidate in chosen) or partition.ruled_units(model.spec.num_layers)
    policy = start or SkipPolicy(units, units[0].first - 1, None, _fitted(run, units))
    if kind == "static":
        policy = replace(policy, network=None)
    elif policy.read != (read := units[0].first - 1):  # the later the state, the more it says of a token's damage
        policy = replace(policy, read=read, network=None)
    if kind == "token" and policy.network is None:
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
        _optimise(run, "regression", modules, settings.regression_steps, rates, regression, settings.windows)
    rates = [(modules.bypasses, settings.bypass_rate), (modules.network, settings.refinement_rate)]
    # A policy has seen the batches of the tunings before; its origin tells the last of them from all others.
    stage, drawn = ("further tuning", start.origin) if start else ("tuning", "")
    rows = rows_at_once(model.spec, settings.window, model.dtype, model.device)
    _optimise(run, stage, modules, settings.tuning_steps, rates, tuning, rows, drawn)
    if kind == "token" and not given:
        modules = SkipModules(_paying(run, modules)).to(model.device)
    return replace(modules.to_policy(), static_order=order or _static_order(run, modules)), chosen


def search_units(run: Run) -> tuple[partition.Candidate, ...]:
    """Return the units that gain most, each tried with a bypass in closed form. Raises PolicyError where none pays."""
    model, settings = run.model, run.settings
    windows = partition.with_dense(model, [run.batch("trials", 0)[0]])
    groups = partition.candidate_groups(model.spec.num_layers, settings.search_every)
    whole = sum(settings.search_steps + TRIAL * len(group) for group in groups)
    tried: list[partition.Candidate] = []
    for number, group in enumerate(groups, 1):
        stage, begun = f"candidates-{number}", (number - 1) * settings.search_steps + TRIAL * len(tried)

        def told(_stage: str, done: int, _steps: int, begun: int = begun) -> None:
            run.progress("candidates", begun + done, whole)

        def damages(group: Sequence[Unit] = group, stage: str = stage, told: Progress = told) -> torch.Tensor:
            sums = _summed(run, group, settings.search_steps, stage, told)
            known: dict[int, torch.Tensor] = run.work.kept(f"{stage}-trials") or {}
            found = torch.zeros(len(group), sum(int(batch.counted.sum()) for batch, _ in windows))
            for place in run.processes.share(range(len(group))):
                if place not in known:
                    unit = group[place]
                    modules = SkipModules(SkipPolicy((unit,), unit.first - 1, None, (sums.fit(unit),)))
                    known[place] = partition.static_damage(model, modules.to(model.device), (0,), windows).cpu()
                    run.work.save_if_due(f"{stage}-trials", lambda: known)
                found[place] = known[place]
                told(stage, settings.search_steps + TRIAL * (place + 1), whole)
            run.processes.add_up([found])
            return found

        for unit, damage in zip(group, run.work.once(stage, damages), strict=True):
            share = saved(model.spec, len(unit.layers))
            gain = partition.mean_gain(damage.numpy(), share, settings.trade_offs)
            tried.append(partition.Candidate(unit, float(damage.mean()), share, gain))
    best = partition.best_partition(tried, model.spec.num_layers)
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
    gains = [partition.mean_gain(*one, run.settings.trade_offs) for one in zip(damages, saved, strict=True)]
    kept = partition.units_that_pay(modules.units, gains)
    return narrowed(modules.to_policy(), (layer for place in kept for layer in modules.units[place].layers))


def _fitted(run: Run, units: Sequence[Unit]) -> tuple[Weights, ...]:
    def fit() -> list[dict[str, torch.Tensor]]:
        sums = _summed(run, units, run.settings.fit_steps, CLOSED_FORM, run.progress)
        return [{name: torch.from_numpy(array) for name, array in sums.fit(unit).items()} for unit in units]

    kept = run.work.once("fit", fit)
    return tuple({name: tensor.numpy() for name, tensor in weights.items()} for weights in kept)


def _summed(run: Run, units: Sequence[Unit], steps: int, stage: str, told: Progress) -> Sums:
    sums, done = Sums(run.model, units), 0
    alone = run.processes.count == 1  # of several processes each has sums of its own, and the first alone saves
    if alone and (state := run.work.kept(f"{stage}-sums")):
        done, sums.tensors = state
    for step in range(done + 1, steps + 1):
        sums.add(run.share("sums", step - 1)[0])
        told(stage, step, steps)
        if alone:
            run.work.save_if_due(f"{stage}-sums", lambda: (step, sums.tensors))  # noqa: B023
    run.processes.add_up(sums.tensors.values())
    return sums


def _static_order(run: Run, modules: SkipModules) -> tuple[int, ...]:
    def order() -> list[int]:
        windows = partition.with_dense(run.model, (run.batch("ranking", step)[0] for step in range(RANKING_BATCHES)))
        known: dict[tuple[int, ...], float] = run.work.kept("ranking-trials") or {}

        def damage(places: tuple[int, ...]) -> float:
            if places not in known:
                known[places] = float(partition.static_damage(run.model, modules, places, windows).mean())
                run.work.save_if_due("ranking-trials", lambda: known)
            return known[places]

        return [*partition.greedy_order([len(unit.layers) for unit in modules.units], damage, run.progress)]

    return tuple(run.work.once("ranking", order))


def _optimise(
    run: Run, stage: str, modules: SkipModules, steps: int, rates: Rates, loss: Loss, rows: int, drawn: str = ""
) -> None:
    """Run AdamW, clipped per group. `rows` windows go through a backward pass at once; `drawn`: for batches."""
    if not steps:
        return
    rates = [(part, rate) for part, rate in rates if len([*part.parameters()])]
    groups = [{"params": [*part.parameters()], "lr": rate} for part, rate in rates]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)
    done, recent = 0, list[float]()

    def state() -> dict[str, Any]:
        return {"step": done, "modules": modules.state_dict(), "optimizer": optimizer.state_dict()}

    if kept := run.work.kept(stage):
        done = kept["step"]
        modules.load_state_dict(kept["modules"])
        optimizer.load_state_dict(kept["optimizer"])
    saved = done
    for step in range(done, steps):
        batch, rng, weight = run.share(stage + drawn, step)
        factor = min(1.0, (step + 1) / 10) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group, (_, rate) in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        optimizer.zero_grad()
        value = _backward(loss, batch, rng, step, weight, rows)
        run.processes.average_gradients([each for group in optimizer.param_groups for each in group["params"]])
        norms = [torch.nn.utils.clip_grad_norm_(group["params"], 1.0) for group in optimizer.param_groups]
        if not torch.stack([value, *norms]).isfinite().all():
            raise PolicyError(
                f"The loss of step {step + 1} of the {stage} is not a number: nothing was saved since step {saved}. "
                "Try --precision float32, or other text."
            )
        optimizer.step()
        done = step + 1
        recent = [*recent[-19:], float(value)]
        run.progress(f"{stage}, loss {np.mean(recent):.3f}", done, steps)
        if run.work.save_if_due(stage, state):
            saved = done
    run.work.save(stage, state())


def _backward(loss: Loss, batch: Batch, rng: np.random.Generator, step: int, weight: float, rows: int) -> torch.Tensor:
    """Add the gradient of `weight` times the batch's mean loss, which is returned, made of `rows` windows at a time."""
    total, whole = torch.zeros((), device=batch.ids.device), batch.counted.sum()
    for start in range(0, len(batch.ids), rows):
        piece = Batch(*(part[start : start + rows] for part in batch))
        value = loss(piece, rng, step) * (piece.counted.sum() / whole)
        (weight * value).backward()  # type: ignore[no-untyped-call]
        total += value.detach()
    return total
