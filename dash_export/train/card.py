"""The card of a policy: how it was trained, and what it does on held-out text."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dash_export import __version__
from dash_export.core.policy import SkipPolicy
from dash_export.core.units import units_text
from dash_export.models import Checkpoint
from dash_export.train.corpus import Batch, Corpus
from dash_export.train.losses import dense_logits, divergence
from dash_export.train.model import Decide, SkipModules, always, below
from dash_export.train.own_answers import JUDGED_SEED
from dash_export.train.partition import Candidate
from dash_export.train.stages import Run

POINTS = 8
"""Number of trade-offs of the dial that are judged."""
STATIC_SETS = 5
"""Number of sets that are judged of a static order: its first unit, its first two, and so on."""


def policy_card(
    checkpoint: Checkpoint,
    policy: SkipPolicy,
    run: Run,
    held: Corpus,
    chosen: Sequence[Candidate],
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the card of a policy that was trained in `run`, judged on `held`; `facts` are on it as they are given."""
    settings, place = run.settings, run.model.device
    figures = held_out_figures(run, SkipModules(policy).to(place), held, policy.static_order)
    return {
        "model": Path(checkpoint.source).name,
        "model_fingerprint": checkpoint.fingerprint,
        "model_bits": round(checkpoint.bits, 2),
        **facts,
        "units": units_text(policy.units),
        "read": policy.read,
        "static_order": units_text(policy.units[place] for place in policy.static_order),
        "chosen": [asdict(candidate) | {"unit": str(candidate.unit)} for candidate in chosen],
        "settings": asdict(settings),
        "tokens": run.corpus.tokens(),
        "held_out": {"tokens": held.tokens()} | figures,
        "versions": {"dash-export": __version__} | {name: version(name) for name in ("torch", "transformers")},
        "precision": str(run.model.dtype).removeprefix("torch."),
        "device": f"{place.type}, {platform.machine()}, {torch.get_num_threads()} threads",
    }


def held_out_figures(
    run: Run, modules: SkipModules, held: Corpus, order: Sequence[int]
) -> dict[str, dict[str, object]]:
    """Return figures by part of the held-out text (own answers; other texts): a row for dense, for the token policy at
    POINTS trade-offs, and for the first sets of the static `order`. Figures are means over the tokens past the prefix:
    layers skipped, KL from dense (nats), top-1 agreement with dense, nll (nats). Each batch is saved.
    """
    settings, units = run.settings, modules.units
    runs: list[tuple[str, Decide]] = [("dense", always(len(units), ()))]
    if modules.network:
        cost = modules.cost(run.model.spec)
        for value in np.geomspace(*settings.trade_offs, POINTS):
            runs.append((f"token, trade-off {value:.3g}", below(float(value) * cost)))
    for largest in range(1, min(STATIC_SETS, len(order)) + 1):
        chosen = order[:largest]
        runs.append((f"static, {', '.join(str(units[place]) for place in chosen)}", always(len(units), chosen)))
    parts, found = held.parts(), dict[str, dict[str, object]]()
    count = max(1, settings.judged_batches // len(parts))
    for part, corpus in parts.items():
        rng, sums = np.random.default_rng(JUDGED_SEED), np.zeros((len(runs), 5))
        for number in range(count):
            batch, stage = corpus.batch(rng, settings.windows, settings.window, run.model.device), f"{part}-{number}"
            if (known := run.work.kept(stage)) is None:
                done = (len(found) * count + number) * len(runs)
                known = _sums(run, modules, batch, [decide for _, decide in runs], done, count * len(parts) * len(runs))
                run.work.save(stage, known)
            sums += np.array(known)
        rows = zip((name for name, _ in runs), *(sums[:, :4] / sums[:, 4:]).round(4).T.tolist(), strict=True)
        keys = ("setting", "skipped", "kl", "top1", "nll")
        figures = [dict(zip(keys, row, strict=True)) for row in rows]
        found[part] = {"judged": int(sums[0, 4]), "figures": figures}
    return found


@torch.no_grad()
def _sums(
    run: Run, modules: SkipModules, batch: Batch, rules: Sequence[Decide], done: int, total: int
) -> list[list[float]]:
    model, (ids, dense, counted) = run.model, batch
    sizes = torch.tensor([len(unit.layers) for unit in modules.units], dtype=torch.float32, device=model.device)
    judged = counted[:, :-1] & counted[:, 1:]  # a token counts where the one after it is text too
    following, final = ids[:, 1:][judged], [*dense_logits(model.head, model.dense(ids)[:, :-1][judged])]
    sums = []
    for index, decide in enumerate(rules, 1):
        rollout = model.rollout(ids, modules, decide, dense)
        found = divergence(model.head, final, rollout.final[:, :-1][judged], following)
        layers = rollout.skipped[:, :-1][judged].float() @ sizes
        values = (layers, found.kl, found.agree, -found.log_likelihood)
        sums.append([*(float(value.double().sum()) for value in values), float(len(following))])
        run.progress("held-out text", done + index, total)
    return sums
