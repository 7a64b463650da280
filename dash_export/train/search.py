"""The units of a model where nobody names them: every candidate is fitted in closed form and skipped alone, on a few
windows, and of the partitions of the layers the best is taken (partition.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from dash_export.decision import Unit
from dash_export.errors import PolicyError
from dash_export.models.spec import DecoderSpec
from dash_export.policy import SkipPolicy
from dash_export.train.closed_form import Sums, sums_bytes
from dash_export.train.cost import saved
from dash_export.train.partition import Candidate, best_partition, candidate_units, judged_candidate
from dash_export.train.ranking import Judged, judged, static_damage
from dash_export.train.run import Run
from dash_export.train.skip_modules import SkipModules

LARGEST_SUMS = 512 << 20
"""Bytes of the sums at once: the search goes over its text once for every group of candidates that fits into them.
While they are saved they are in memory three times.
"""
SUM_COST, TRIAL_COST = 2, 1
"""What summing a batch up, and a trial on one, cost, in forward passes of a batch."""


def search_units(run: Run) -> tuple[Candidate, ...]:
    """The units to train, with what they were chosen by. Raises PolicyError where none pays."""
    windows = judged(run.model, [run.batch("trials", 0)[0]])
    tried: list[Candidate] = []
    for group in search_groups(run.model.spec):
        tried += _tried(run, group, windows)
    best = best_partition(tried, run.model.spec.num_layers)
    if not best:
        raise PolicyError(
            "Skipping any unit of this model costs more than it saves over these trade-offs: give higher ones "
            "(--trade-offs), or the units (--units)."
        )
    return best


def search_work(spec: DecoderSpec, steps: int) -> int:
    """In forward passes of a batch."""
    groups = search_groups(spec)
    return len(groups) * steps * SUM_COST + sum(map(len, groups)) * TRIAL_COST


def search_groups(spec: DecoderSpec) -> list[list[Unit]]:
    """All candidates, in groups whose sums are in memory at once; those that begin at one layer share theirs."""
    groups: list[list[Unit]] = [[]]
    for _, units in groupby(candidate_units(spec.num_layers), key=lambda unit: unit.first):
        together = [*units]
        if groups[-1] and sums_bytes(spec, groups[-1] + together) > LARGEST_SUMS:
            groups.append([])
        groups[-1] += together
    return groups


def summed(run: Run, stage: str, name: str, units: Sequence[Unit], steps: int) -> Sums:
    """The sums of these units over so many batches of a stage, or what is left to do of them."""
    sums = Sums(run.model, units)
    first = run.restore(stage, lambda state: sums.load(state["sums"]))
    run.advance(name, first * SUM_COST)
    for step in range(first, steps):
        sums.add(run.batch("sums", step)[0])
        run.advance(name, SUM_COST)
        if run.due(step, steps):
            run.save(stage, step + 1, sums=sums.state())
    return sums


def _tried(run: Run, group: Sequence[Unit], windows: Sequence[Judged]) -> list[Candidate]:
    """A group's candidates, each skipped alone."""
    name, settings, spec = "candidates skipped alone", run.settings, run.model.spec
    stage, found = f"candidates-{group[0].first}", list[Candidate]()
    run.restore(stage, lambda state: found.extend([Candidate(Unit(*unit), *own) for unit, *own in state["found"]]))
    run.advance(name, len(found) * TRIAL_COST)
    if len(found) == len(group):
        run.advance(name, settings.search_steps * SUM_COST)
        return found
    sums = summed(run, f"{stage}-sums", "candidates in closed form", group, settings.search_steps)
    for number, unit in enumerate(group[len(found) :], len(found)):
        policy = SkipPolicy((unit,), unit.first - 1, None, (sums.fit(unit),))
        modules = SkipModules(policy).to(run.model.device)
        damage = static_damage(run.model, modules, (0,), windows).float().cpu().numpy()
        cost = saved(spec, len(unit.layers))
        found.append(judged_candidate(unit, damage, cost, settings.trade_offs))
        run.advance(name, TRIAL_COST)
        if run.due(number, len(group)):
            rows = [((own.unit.first, own.unit.last), own.damage, own.saved, own.gain) for own in found]
            run.save(stage, len(found), found=rows)
    run.forget(f"{stage}-sums")
    return found
