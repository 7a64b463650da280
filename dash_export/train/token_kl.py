"""KL(dense || skipped) per token from hidden states, without ever holding two vocabularies' worth of logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

ROWS = 64


@dataclass(frozen=True)
class Divergence:
    """Per token [n]: KL in nats, whether the likeliest token agrees, the skipped model's log-likelihood of a target."""

    kl: torch.Tensor
    agree: torch.Tensor
    log_likelihood: torch.Tensor


@torch.no_grad()
def divergence(head: torch.Tensor, dense: torch.Tensor, skipped: torch.Tensor, targets: torch.Tensor) -> Divergence:
    """head [vocab, hidden]; dense and skipped final states [n, hidden]; targets [n] (the tokens that follow)."""
    parts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    for start in range(0, len(dense), ROWS):
        rows = slice(start, start + ROWS)
        p, q = (dense[rows] @ head.T).float(), (skipped[rows] @ head.T).float()
        lse_p, lse_q = p.logsumexp(-1), q.logsumexp(-1)
        chosen = q.gather(-1, targets[rows, None])[:, 0] - lse_q
        agree = p.argmax(-1) == q.argmax(-1)
        q.neg_().add_(p)
        kl = (p.sub_(lse_p[:, None]).exp_() * q).sum(-1) - lse_p + lse_q
        parts.append((kl, agree, chosen))
    return Divergence(*(torch.cat(column) for column in zip(*parts, strict=True)))


class _SummedDivergence(torch.autograd.Function):
    """The gradient for `skipped` is made on the way forward, d KL / d logits = q - p, so no logits are kept."""

    @staticmethod
    def forward(
        ctx: Any, head: torch.Tensor, dense: torch.Tensor, skipped: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor:
        total = torch.zeros((), device=skipped.device)
        gradient = torch.empty_like(skipped)
        for start in range(0, len(dense), ROWS):
            rows = slice(start, start + ROWS)
            p, q = (dense[rows] @ head.T).float(), (skipped[rows] @ head.T).float()
            lse_p, lse_q = p.logsumexp(-1), q.logsumexp(-1)
            difference = p - q
            p.sub_(lse_p[:, None]).exp_()
            total += (((p * difference).sum(-1) - lse_p + lse_q) * weight[rows]).sum()
            q.sub_(lse_q[:, None]).exp_().sub_(p).mul_(weight[rows, None])
            gradient[rows] = q.to(head.dtype) @ head
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[None, None, torch.Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return None, None, gradient * upstream[0].to(gradient.dtype), None


def summed_divergence(
    head: torch.Tensor, dense: torch.Tensor, skipped: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """Sum over rows of weight * KL(dense || skipped), differentiable in `skipped`: head [vocab, hidden], states
    [n, hidden], weight [n] -> scalar.
    """
    total: torch.Tensor = _SummedDivergence.apply(head, dense, skipped, weight)  # type: ignore[no-untyped-call]
    return total
