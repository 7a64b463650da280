"""Training of a drafter: a linear beginning in closed form, then gradients.

The loss is the cross entropy to the model's likeliest tokens of the short vocabulary, and a little of the distance to
its state (EAGLE, arXiv 2401.15077). A first part of the steps trains first drafts alone, the others chains.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from dash_export.core.drafter import from_codes, in_codes
from dash_export.files.artifacts import Progress
from dash_export.train import DrafterSettings
from dash_export.train.draft_layer import DraftLayer
from dash_export.train.losses import dense_logits
from dash_export.train.model import GatedModel, Head
from dash_export.train.own_text import Written
from dash_export.train.work import Work

RIDGE = 1e-2
"""Ridge, relative to the mean square of the inputs."""
BRANCH = 0.1
"""Share of what the layer's branches add in the model that they add at the beginning, where the maps guess it all."""
LATER, DISTANCE, PROMPTS = 0.6, 0.1, 0.5
"""Weights in the loss: of a deeper draft, of the distance of states, and of a token of a prompt."""
DECAY = 0.8
"""Power of the share of steps that are left, by which the learning rate falls."""
COUNTED = 8
"""One in so many tokens' probabilities is summed for the short vocabulary."""
_STAGE = "drafter"


class Batch(NamedTuple):
    """Texts padded on the right, as in Written. `weight` [batch, tokens]: of a place in the loss; 0 for padding."""

    ids: torch.Tensor
    states: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    weight: torch.Tensor


def padded_batch(texts: Sequence[Written], device: torch.device) -> Batch:
    ids, states, keys, values = (
        nn.utils.rnn.pad_sequence([each.transpose(0, -2) if each.ndim == 3 else each for each in part], True)
        for part in zip(*(text[:4] for text in texts), strict=True)
    )
    weight = [torch.full((len(text.ids),), 1.0) for text in texts]
    for each, text in zip(weight, texts, strict=True):
        each[: text.start - 1] = PROMPTS
    whole = (ids, states, keys.transpose(1, 2), values.transpose(1, 2), nn.utils.rnn.pad_sequence(weight, True))
    return Batch(*(each.to(device) for each in whole))


def short_vocabularies(gated: GatedModel, texts: Sequence[Written], sizes: Sequence[int]) -> list[torch.Tensor]:
    """Return so many tokens, in rising order, of those that are most in the texts or that the model might have put
    there: its probabilities know tokens that no text has yet.
    """
    mass = torch.zeros(gated.spec.vocab_size)
    for text in texts:
        mass += text.ids.bincount(minlength=len(mass))
    states = torch.cat([text.states[::COUNTED] for text in texts]).to(gated.device)
    for logits in dense_logits(gated.head, states):
        mass += COUNTED * capped(gated.head, logits.float()).softmax(-1).sum(0).cpu()
    order = mass.sort(descending=True, stable=True).indices
    return [order[:most].sort().values for most in sizes]


def head_rows(head: Head, tokens: torch.Tensor) -> Head:
    return head._replace(weight=head.weight[tokens.to(head.weight.device)].contiguous())


def capped(head: Head, logits: torch.Tensor) -> torch.Tensor:
    return head.cap * torch.tanh(logits / head.cap) if head.cap else logits


class Likeliest(NamedTuple):
    """The model's likeliest tokens after each place of a text, as rows of the short vocabulary, and their chances
    among it [tokens, likeliest].
    """

    rows: torch.Tensor
    chances: torch.Tensor


@torch.no_grad()
def likeliest(head: Head, text: Written, most: int) -> Likeliest:
    logits = short_logits(head, text.states.to(head.weight.device))
    best = logits.topk(min(most, logits.shape[-1]), -1)
    chances = (best.values - logits.logsumexp(-1, keepdim=True)).exp()
    return Likeliest(best.indices.int().cpu(), chances.half().cpu())


def short_logits(head: Head, states: torch.Tensor) -> torch.Tensor:
    """Return the logits [..., tokens] float32 of a head's rows for states [..., hidden]."""
    return capped(head, (states.to(head.weight.dtype) @ head.weight.T).float())


@torch.no_grad()
def begin(layer: DraftLayer, texts: Sequence[Written]) -> None:
    """Set the maps by ridge regression of the next state, before the gain of the norm, and shrink the branches."""
    hidden, device = layer.spec.hidden_size, layer.norm.device
    xx = torch.zeros(2 * hidden, 2 * hidden, dtype=torch.float64, device=device)
    xy = torch.zeros(2 * hidden, hidden, dtype=torch.float64, device=device)
    gain = torch.where(layer.norm.abs() < 1e-6, 1.0, layer.norm)
    for text in texts:
        states = text.states.to(device).float()
        x = torch.cat([states[:-1], layer.inputs(text.ids[1:].to(device))], 1)
        xx += (x.T @ x).double()
        xy += (x.T @ (states[1:] / gain)).double()
    mean = xx.diagonal().view(2, hidden).mean(1, keepdim=True).expand(2, hidden).flatten()
    found = torch.linalg.solve(xx + RIDGE * mean.diag(), xy).float().T
    layer.state.weight.copy_(found[:, :hidden])
    layer.embedding.weight.copy_(found[:, hidden:])
    layer.scale_branches(BRANCH)


def chain_loss(
    layer: DraftLayer, head: Head, batch: Batch, rows: torch.Tensor, chances: torch.Tensor, depth: int
) -> tuple[torch.Tensor, float]:
    """Return the loss of a chain of `depth` drafts, and the share of first drafts that are the model's likeliest token.
    `rows` and `chances` [batch, tokens, likeliest] are those of Likeliest.
    """
    loss, first = torch.zeros((), device=batch.ids.device), 0.0
    for d, states in enumerate(layer.chain(batch.ids, batch.states, batch.keys, batch.values, depth)):
        weight = batch.weight[:, 1 + d :]
        counted = weight > 0
        share, states = weight[counted] / weight.sum(), states[counted]
        best, chance = rows[:, 1 + d :][counted], chances[:, 1 + d :][counted]
        logits = short_logits(head, states)
        entropy = -(chance * (logits.gather(-1, best) - logits.logsumexp(-1, keepdim=True))).sum(-1)
        true = batch.states[:, 1 + d :][counted].float()
        distance = nn.functional.smooth_l1_loss(states, true, reduction="none").mean(-1)
        loss = loss + (LATER if d else 1.0) * (share * (entropy + DISTANCE * distance)).sum()
        if not d:
            first = float((share * (logits.detach().argmax(-1) == best[:, 0])).sum())
    return loss, first


def batches(texts: Sequence[Written], tokens: int, seed: Sequence[int]) -> list[list[int]]:
    """Return the texts' places in random batches of texts of like length, of about `tokens` tokens with padding."""
    rng = np.random.default_rng(seed)
    order, found = rng.permutation(len(texts)), list[list[int]]()
    for start in range(0, len(order), 64):
        batch = list[int]()
        for place in sorted(order[start : start + 64].tolist(), key=lambda place: len(texts[place].ids)):
            if batch and (len(batch) + 1) * len(texts[place].ids) > tokens:
                found.append(batch)
                batch = []
            batch.append(place)
        found.append(batch)
    return [found[place] for place in rng.permutation(len(found))]


def fitted(
    gated: GatedModel, head: Head, texts: Sequence[Written], settings: DrafterSettings, work: Work, progress: Progress
) -> DraftLayer:
    """Train a drafter on `texts`, with progress by steps, saved in `work`."""
    layer, step = DraftLayer(gated), 0
    maps = [layer.state.weight, layer.embedding.weight]
    others = [
        parameter for name, parameter in layer.named_parameters() if name not in ("state.weight", "embedding.weight")
    ]
    rates = (settings.map_rate, settings.layer_rate)
    groups = [{"params": part, "lr": rate} for part, rate in zip((maps, others), rates, strict=True)]
    optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.01)
    if kept := work.kept(_STAGE):
        layer.load_state_dict(kept["layer"])
        optimiser.load_state_dict(kept["optimiser"])
        step = kept["step"]
    else:
        begin(layer, texts)
    best = [likeliest(head, text, settings.likeliest) for text in texts]
    plan = [
        places
        for epoch in range(settings.epochs)
        for places in batches(texts, settings.batch_tokens, (settings.seed, epoch))
    ]
    while step < len(plan):
        done = step / len(plan)
        pace = min(1.0, (step + 1) / settings.warm_up_steps) * (1 - done) ** DECAY
        for group, rate in zip(optimiser.param_groups, rates, strict=True):
            group["lr"] = rate * pace
        batch = padded_batch([texts[place] for place in plan[step]], gated.device)
        rows, chances = (
            nn.utils.rnn.pad_sequence([best[place][part] for place in plan[step]], True).to(gated.device)
            for part in (0, 1)
        )
        with torch.autocast(gated.device.type, gated.dtype, enabled=gated.dtype != torch.float32):
            depth = 1 if done < settings.first_alone else settings.depth
            loss, _ = chain_loss(layer, head, batch, rows.long(), chances.float(), depth)
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
        optimiser.step()
        step += 1
        progress("drafter", step, len(plan))
        work.save_if_due(_STAGE, partial(_progress, layer, optimiser, step))
    return layer


def _progress(layer: DraftLayer, optimiser: torch.optim.Optimizer, step: int) -> dict[str, Any]:
    return {"layer": layer.state_dict(), "optimiser": optimiser.state_dict(), "step": step}


@torch.no_grad()
def round_weights(layer: DraftLayer) -> None:
    """Round matrices as a policy file keeps them."""
    for parameter in layer.parameters():
        if parameter.ndim == 2:
            parameter.copy_(torch.from_numpy(from_codes(*in_codes(parameter.cpu().numpy()))))
