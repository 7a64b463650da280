"""Self-generated text: continuations of chat prompts, on which a deployed policy acts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from dash_export.artifacts import Progress, no_progress
from dash_export.train.corpus import SHORTEST, Passage, TokenIds
from dash_export.train.gated_model import GatedModel

BATCH = 32
TEMPERATURE = 0.7


def continue_prompts(
    model: GatedModel,
    prompts: Sequence[TokenIds],
    tokens: int,
    eos_ids: frozenset[int],
    seed: int,
    progress: Progress = no_progress,
) -> list[Passage]:
    """Sample up to `tokens` tokens after each prompt, densely; prompts of like length share a batch. Continuations
    shorter than SHORTEST tokens are left out.
    """
    torch.manual_seed(seed)
    passages = []
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for start in range(0, len(order), BATCH):
        chosen = [prompts[index] for index in order[start : start + BATCH]]
        width = max(map(len, chosen))
        ids = np.zeros((len(chosen), width), np.int64)
        mask = np.zeros((len(chosen), width), np.int64)
        for row, prompt in enumerate(chosen):  # padded on the left, as generation wants it
            ids[row, width - len(prompt) :] = prompt
            mask[row, width - len(prompt) :] = 1
        made = model.model.generate(
            input_ids=torch.from_numpy(ids).to(model.device),
            attention_mask=torch.from_numpy(mask).to(model.device),
            max_new_tokens=tokens,
            do_sample=True,
            temperature=TEMPERATURE,
            top_k=0,
            eos_token_id=sorted(eos_ids) or None,
            pad_token_id=0,
        ).cpu()
        for prompt, row in zip(chosen, made[:, width:].numpy(), strict=True):
            ends = np.flatnonzero(np.isin(row, list(eos_ids)))
            words = row[: ends[0] + 1] if len(ends) else row
            if len(words) >= SHORTEST:
                passages.append(Passage(np.concatenate([prompt, words]), len(prompt)))
        progress("self-generated text", min(start + BATCH, len(order)), len(order))
    return passages
