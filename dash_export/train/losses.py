"""Losses: divergence from the dense model, damage regression, and the two tunings.

Damage regression teaches the network what skipping costs, from forward passes alone. The target is the divergence of a
skipped pass from the dense one, per token; the prediction is the sum of the damages of the units that token skipped:

    loss = (sqrt(sum of damages + SOFTENING) - sqrt(KL + SOFTENING))^2

Thresholding the result is the one-step greedy policy of the Markov decision process (docs/method.md). Tuning then moves
bypasses and network together: for a window at trade-off λ a rollout costs KL + λ * time. The bypasses follow the
gradient of the KL. A decision has no gradient; the network follows the straight-through one (Bengio et al. 2013, arXiv
1308.3432): the forward pass takes the decision, the backward pass its softened form, sigmoid((limit - damage) /
(SOFTNESS * limit)). So every decision of a token gets the gradient of its effect on this token and, through what later
layers write to the KV cache, on later ones; not of what the unit's own K and V do, which are chosen without a gradient.
The roots make the damage learnt the mean KL less the variance of sqrt(KL + SOFTENING): a little low.

Losses compare distributions over the corpus's most frequent tokens (`GatedModel.common`), figures over all.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from dash_export.train.corpus import Batch
from dash_export.train.model import GatedModel, Head, SkipModules, below

LOGITS = 1 << 23
"""Number of logits that are compared at once, in float32: of 55 tokens where the vocabulary is Qwen's."""
SOFTENING = 0.02
"""Nats. The square root evens out errors of small and large divergences; SOFTENING keeps its slope finite at zero."""
LARGEST_RATE, EXPLORATION, MASKS = 0.6, 0.1, 2
"""In the regression: largest rate of random skips, share of random decisions, skipped passes per dense one."""
SOFTNESS = 0.3

_Block = tuple[slice, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


class Divergence(NamedTuple):
    """Per token [n]: KL in nats, whether the likeliest token agrees, the skipped model's log-likelihood of a target."""

    kl: torch.Tensor
    agree: torch.Tensor
    log_likelihood: torch.Tensor


def dense_logits(head: Head, states: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the logits of states [n, hidden], LOGITS at a time, before the cap and in the dtype of the states: a list
    of them may be compared with several others.
    """
    with torch.no_grad():
        for block in torch.split(states, max(1, LOGITS // len(head.weight))):
            yield block @ head.weight.T


@torch.no_grad()
def kl_divergence(head: Head, dense: Iterable[torch.Tensor], skipped: torch.Tensor) -> torch.Tensor:
    """Return KL(dense || skipped) in nats of n tokens [n]: `dense_logits`, and skipped final states [n, hidden]."""
    return torch.cat([_kl(p, q, lse_p, lse_q) for _, p, q, lse_p, lse_q in _logits(head, dense, skipped)])


def _kl(p: torch.Tensor, q: torch.Tensor, lse_p: torch.Tensor, lse_q: torch.Tensor) -> torch.Tensor:
    """Write over p and q."""
    q.neg_().add_(p)
    return (p.sub_(lse_p[:, None]).exp_() * q).sum(-1) - lse_p + lse_q


@torch.no_grad()
def divergence(head: Head, dense: Iterable[torch.Tensor], skipped: torch.Tensor, targets: torch.Tensor) -> Divergence:
    """Compare `dense_logits` of n tokens with skipped states [n, hidden]; targets [n] are the tokens that follow."""
    parts = []
    for rows, p, q, lse_p, lse_q in _logits(head, dense, skipped):
        chosen = q.gather(-1, targets[rows, None])[:, 0] - lse_q
        agree = p.argmax(-1) == q.argmax(-1)
        parts.append((_kl(p, q, lse_p, lse_q), agree, chosen))
    return Divergence(*(torch.cat(column) for column in zip(*parts, strict=True)))


def summed_divergence(
    head: Head, dense: Iterable[torch.Tensor], skipped: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """Return the sum over rows of weight [n] * KL(dense || skipped), differentiable in `skipped` [n, hidden]. The
    gradient is made in the same pass, d KL / d logits = q - p; no logits stay.
    """
    total = torch.zeros((), device=skipped.device)
    gradient = torch.empty_like(skipped)
    with torch.no_grad():
        for rows, p, q, lse_p, lse_q in _logits(head, dense, skipped):
            difference = p - q
            slope = 1 - (q / head.cap) ** 2 if head.cap else None
            p.sub_(lse_p[:, None]).exp_()
            total += (((p * difference).sum(-1) - lse_p + lse_q) * weight[rows]).sum()
            q.sub_(lse_q[:, None]).exp_().sub_(p).mul_(weight[rows, None])
            q = q if slope is None else q.mul_(slope)
            gradient[rows] = q.to(head.weight.dtype) @ head.weight
    through = (skipped * gradient).sum()  # of this gradient, whatever its value
    return total + (through - through.detach())


def _logits(head: Head, dense: Iterable[torch.Tensor], skipped: torch.Tensor) -> Iterator[_Block]:
    """Yield (rows, logits of both [rows, vocab], their logsumexp [rows]) of a block of tokens after the other."""
    start = 0
    for block in dense:
        rows = slice(start, start := start + len(block))
        p = block.to(torch.float32, copy=True)  # what takes it may write over it
        q = (skipped[rows] @ head.weight.T).float()
        if head.cap:
            p, q = (head.cap * torch.tanh(each / head.cap) for each in (p, q))
        yield rows, p, q, p.logsumexp(-1), q.logsumexp(-1)


def regression_loss(
    model: GatedModel,
    modules: SkipModules,
    trade_offs: tuple[float, float],
    batch: Batch,
    rng: np.random.Generator,
    on_policy: bool = True,
) -> torch.Tensor:
    """Return the loss of the damage regression over one batch, with a gradient for the network's weights.

    Half of the windows skip at random, independently per token and unit, at a rate drawn per window: this exploration
    tells units apart. The other half, if `on_policy`, follow the network as it is, at a trade-off drawn per window
    (nats per dense token time), with EXPLORATION: the policy will meet such states, over the whole dial.
    """
    ids, dense, counted = (part.repeat(MASKS, 1) for part in batch)
    windows = len(ids)
    rates = rng.random((windows, 1, 1), dtype=np.float32) * LARGEST_RATE
    limits = _drawn(rng, windows, trade_offs).to(model.device)[:, None, None] * modules.cost(model.spec)
    drawn = rng.random((2, *ids.shape, len(modules.units)), dtype=np.float32)
    at_random = (np.arange(windows) % 2 == 0)[:, None, None] | (not on_policy)
    free = torch.from_numpy(drawn[0] < rates).to(model.device)
    replaced = torch.from_numpy((drawn[1] < EXPLORATION) | at_random).to(model.device)
    with torch.no_grad():
        final = [*dense_logits(model.common, model.dense(batch.ids)[batch.counted])]
        rollout = model.rollout(ids, modules, lambda damage: torch.where(replaced, free, damage < limits), dense)
        kl = torch.cat([kl_divergence(model.common, final, masked) for masked in rollout.final[counted].chunk(MASKS)])
    predicted = (modules.damage(rollout.state) * rollout.skipped).sum(-1)[counted]
    return ((predicted + SOFTENING).sqrt() - (kl.clamp_min(0) + SOFTENING).sqrt()).pow(2).mean()


def tuning_loss(
    model: GatedModel, modules: SkipModules, trade_offs: tuple[float, float], batch: Batch, rng: np.random.Generator
) -> torch.Tensor:
    """Return (KL + λ * time) / λ over one batch, but for a constant. The division keeps high trade-offs from
    outweighing all others, though not wholly: KL grows as about λ^3. It has gradients for bypasses and network.
    """
    ids, dense, counted = batch
    drawn = _drawn(rng, len(ids), trade_offs).to(model.device)[:, None]
    cost = modules.cost(model.spec)
    limits = drawn[..., None] * cost
    with torch.no_grad():
        final = model.dense(ids)[counted]

    def soften(damage: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid((limits - damage) / (SOFTNESS * limits))

    rollout = model.rollout(ids, modules, below(limits), dense, soften)
    weight = (1 / drawn).expand(ids.shape)[counted] / counted.sum()
    loss = summed_divergence(model.common, dense_logits(model.common, final), rollout.final[counted], weight)
    return loss - (rollout.taken[counted] @ cost).mean()


def static_loss(
    model: GatedModel, modules: SkipModules, order: Sequence[int], batch: Batch, rng: np.random.Generator
) -> torch.Tensor:
    """Return the KL where the first units of a static `order` are skipped. Their number is drawn per window, up to half
    of the model's layers. It has gradients for the bypasses.
    """
    ids, dense, counted = batch
    sizes = [len(modules.units[place].layers) for place in order]
    largest = max(1, int((np.cumsum(sizes) <= model.spec.num_layers / 2).sum()))
    counts = rng.integers(1, largest + 1, len(ids))
    skipped = torch.from_numpy(np.argsort(order) < counts[:, None]).to(model.device)[:, None]
    with torch.no_grad():
        final = model.dense(ids)[counted]
    rollout = model.rollout(ids, modules, lambda damage: skipped.expand(damage.shape), dense)
    weight = torch.full((len(final),), 1 / len(final), device=model.device)
    return summed_divergence(model.common, dense_logits(model.common, final), rollout.final[counted], weight)


def _drawn(rng: np.random.Generator, count: int, bounds: tuple[float, float]) -> torch.Tensor:
    """Draw log-uniform trade-offs, float32 [count]."""
    low, high = np.log(bounds)
    return torch.from_numpy(np.exp(rng.uniform(low, high, count)).astype(np.float32))
