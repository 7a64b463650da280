"""Calibration of the dial: what each trade-off gives on the calibration text, in layers, time on this target and KL.

It needs the cost table and no training: every build calibrates a policy anew that was trained once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dash_export.bundle.bundle import Bundle
from dash_export.bundle.layout import ANSWERS
from dash_export.bundle.records import Build
from dash_export.core.dial import DialPoint
from dash_export.core.divergence import DenseRows
from dash_export.core.input_table import held_out, input_dial
from dash_export.core.units import DENSE_POSITIONS, unit_skips
from dash_export.errors import PolicyError
from dash_export.files.artifacts import Progress, no_progress
from dash_export.files.resources import resource_folder
from dash_export.runtime import DashRuntime
from dash_export.text.chats import DIAL_ANSWERS, Continuation, continuation, parsed_chats
from dash_export.text.text_files import MAX_TEXT_BYTES, bounded_text

if TYPE_CHECKING:
    from dash_export.backends.base import Started

WINDOWS = 16
TOKENS = 128
PREFIX = 32
"""Dense tokens at the beginning of a window of text, like a prompt. The tokens after them are measured."""
SHARES = (0.005, 0.03, 0.08, 0.15, 0.24, 0.36, 0.55, 0.8, 0.97)
"""Shares of units that the trade-offs skip, by the damage of a dense pass. Two more skip nothing and everything."""
LEAST = 1e-3
"""Fraction of a token. A unit that saves less pays at no trade-off that is worth a point."""


def calibrate_dial(
    bundle: Bundle, build: Build, backend: Started, progress: Progress = no_progress
) -> tuple[DialPoint, ...]:
    """Return the points of the dial, from dense to everything skipped. Each trade-off is run under its own decisions.

    KL is measured against the dense mode of the same build. Return () where the model's context is a few tokens only.
    """
    if bundle.manifest.model.decides == "input":
        return _of_inputs(bundle, build)
    runtime = DashRuntime(bundle, build, backend)
    items = _calibration_items(runtime)
    if not items:  # the model's context has only a few tokens
        return ()
    num_layers = bundle.manifest.model.num_layers
    trade_offs = _trade_offs(runtime, items)
    sums = np.zeros((len(trade_offs), 5))  # layers skipped, time, KL in nats, log-likelihood lost, other next tokens
    tokens = 0
    for done, item in enumerate(items, 1):
        sums += _measured(runtime, item, trade_offs)
        tokens += len(item.ids) - item.prefix
        progress("calibrating the dial", done, len(items))
    judged = tokens - len(items)  # an item's last token has no successor
    points = [DialPoint(0.0, float(num_layers), runtime.cost.dense_asked, 0.0)]
    for trade_off, (skipped, time, kl, lost, other) in zip(trade_offs, sums / tokens, strict=True):
        perplexity = round(float(np.exp(min(lost * tokens / judged, 50.0))), 5)
        layers = round(num_layers - skipped, 4)
        figures = (layers, round(time, 5), round(max(0.0, kl), 6), perplexity)
        points.append(DialPoint(trade_off, *figures, differing=round(other * tokens), judged=tokens))
    return tuple(points)


def _of_inputs(bundle: Bundle, build: Build) -> tuple[DialPoint, ...]:
    """Return the dial of a policy that decides about whole inputs; () where it came without held-out ones."""
    path, manifest = bundle.root / ANSWERS, bundle.manifest
    if not path.is_file():
        return ()
    units = manifest.policy.units
    table = held_out(bounded_text(path, MAX_TEXT_BYTES), len(units))
    return input_dial(table, build.cost, units, manifest.model.num_layers)


def _trade_offs(runtime: DashRuntime, items: Sequence[Continuation]) -> list[float]:
    """Return rising trade-offs, chosen by the damage of dense passes. The last one skips all that saves anything."""
    # With a trade-off of 0 nothing is skipped, and the policy network is asked all the same.
    session = runtime.session("token", trade_off=0.0)
    damage = np.concatenate([session.score(ids, prefix).damage[prefix:] for ids, prefix in items]).astype(np.float64)
    cost = np.asarray(runtime.cost.cost)
    worth = np.flatnonzero(cost > LEAST) if (cost > LEAST).any() else np.arange(len(cost))
    ratios = damage[:, worth] / np.maximum(cost[worth], 1e-9)
    if not np.isfinite(ratios).all():
        raise PolicyError("The policy's network gives damages that are no numbers: train it again, or export another.")
    # Far beyond the largest ratio everything is skipped, however much skipping itself changes the damage.
    found = [*np.quantile(ratios, SHARES), 4.0 * ratios.max() + 1.0]
    return sorted({float(f"{trade_off:.6g}") for trade_off in found})


def _measured(runtime: DashRuntime, item: Continuation, trade_offs: Sequence[float]) -> npt.NDArray[np.float64]:
    """Measure an item under each trade-off. Return [trade-offs, 5], sums over the tokens after its prompt: layers
    skipped, time as fractions of dense, KL in nats, log-likelihood of the text lost, and tokens after which another
    one is the likeliest.
    """
    window, prompt = item
    dense = runtime.session("dense").score(window, prompt, keep_logits=True)
    assert dense.logits is not None
    reference, likeliest = DenseRows(dense.logits[prompt:]), dense.logits[prompt:].argmax(axis=1)
    found = []
    for trade_off in trade_offs:
        score = runtime.session("token", trade_off=trade_off).score(window, prompt, keep_logits=True)
        assert score.logits is not None
        actions = score.actions[prompt:]
        skips = unit_skips(actions, runtime.bundle.manifest.policy.units)
        time = runtime.cost.token_time(skips, asked=True).sum()
        lost = (dense.log_likelihoods - score.log_likelihoods)[prompt:].sum()
        logits = score.logits[prompt:]
        other = (logits.argmax(axis=1) != likeliest).sum()
        found.append((actions.sum(), time, reference.kl(logits).sum(), lost, other))
    return np.array(found, np.float64)


def _calibration_items(runtime: DashRuntime) -> list[Continuation]:
    """Return about WINDOWS items of about TOKENS tokens: the model's held-out answers, where they came with the policy,
    or else windows of the shipped text, the first PREFIX tokens dense. There may be none where the context is short.
    """
    longest, own = runtime.engines.model.max_positions, runtime.bundle.root / ANSWERS
    if own.is_file():
        chats = parsed_chats(bounded_text(own, MAX_TEXT_BYTES), str(own))
        answered = (chat for chat in chats[:DIAL_ANSWERS] if chat.answer is not None)
        items = (continuation(runtime.text, chat, longest, TOKENS) for chat in answered)
        if found := [item for item in items if item is not None]:
            return found
    text = (resource_folder("calibration") / "prose.txt").read_text(encoding="utf-8")
    window = min(TOKENS, longest)
    prompt = min(PREFIX, window // 2)
    windows = runtime.text.windows(text, WINDOWS * TOKENS // window, window)
    return [Continuation(ids, prompt) for ids in windows if len(ids) > DENSE_POSITIONS + 1]
