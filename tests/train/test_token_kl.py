from __future__ import annotations

import torch

from dash_export.train.token_kl import ROWS, divergence, summed_divergence


def states(rows: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    head, dense, skipped = (torch.randn(*shape, generator=generator) for shape in ((50, 8), (rows, 8), (rows, 8)))
    return head, dense, skipped, torch.randint(0, 50, (rows,), generator=generator)


def reference(head: torch.Tensor, dense: torch.Tensor, skipped: torch.Tensor) -> torch.Tensor:
    p, q = torch.log_softmax(dense @ head.T, -1), torch.log_softmax(skipped @ head.T, -1)
    return (p.exp() * (p - q)).sum(-1)


def test_divergence_over_several_blocks() -> None:
    head, dense, skipped, targets = states(2 * ROWS + 3)
    found = divergence(head, dense, skipped, targets)
    torch.testing.assert_close(found.kl, reference(head, dense, skipped), atol=1e-5, rtol=1e-4)
    expected = torch.log_softmax(skipped @ head.T, -1).gather(-1, targets[:, None])[:, 0]
    torch.testing.assert_close(found.log_likelihood, expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(found.agree, (dense @ head.T).argmax(-1) == (skipped @ head.T).argmax(-1))


def test_summed_divergence_has_the_gradient_of_autograd() -> None:
    head, dense, skipped, _ = states(ROWS + 5)
    weight = torch.rand(len(dense), generator=torch.Generator().manual_seed(1))
    ours, theirs = skipped.clone().requires_grad_(), skipped.clone().requires_grad_()
    value = summed_divergence(head, dense, ours, weight)
    expected = (reference(head, dense, theirs) * weight).sum()
    torch.testing.assert_close(value, expected, atol=1e-4, rtol=1e-4)
    (3 * value).backward()
    (3 * expected).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-4)
