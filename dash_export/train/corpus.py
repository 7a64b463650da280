"""Text to learn from: windows of token ids with a dense prefix each, as decode will see them.

A policy acts after a prompt: the prompt is dense, what follows is skipped. So every window says how many of its first
tokens are dense: the prompt of a chat, or a random few of a passage of prose. Self-generated text, continuations of
chat prompts, is what a deployed policy acts on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer

from dash_export.artifacts import Progress, no_progress
from dash_export.decision import DENSE_POSITIONS
from dash_export.errors import RequestError
from dash_export.runtime.text import Text
from dash_export.text_files import read_text
from dash_export.train.defaults import TrainingSettings

TokenIds = npt.NDArray[np.int64]
SHORTEST = 16
"""Fewer continuation tokens than this are not worth a row of a batch."""
GENERATED_BATCH, TEMPERATURE = 32, 0.7
SELF_GENERATED = "self-generated"
JUDGED_SEED = 20252
"""Of what is held out: not the training's, so that trainings compare."""


@dataclass(frozen=True)
class Batch:
    """ids int64 [batch, tokens]; dense and counted bool [batch, tokens]: rows every layer runs for, and rows that are
    text and not padding, past the prefix, so that their divergence counts.
    """

    ids: TokenIds
    dense: npt.NDArray[np.bool_]
    counted: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Passage:
    """One piece of text as token ids; `prefix` is its prompt's length, or None for prose without one."""

    ids: TokenIds
    prefix: int | None = None


@dataclass
class Corpus:
    """Passages by source. Sources are drawn alike often, whatever their size; within one, by length."""

    sources: dict[str, list[Passage]] = field(default_factory=dict)

    def tokens(self) -> dict[str, int]:
        """Tokens per source."""
        return {name: sum(len(passage.ids) for passage in passages) for name, passages in self.sources.items()}

    def batch(self, rng: np.random.Generator, size: int, window: int) -> Batch:
        """`size` random windows of `window` tokens."""
        ids = np.zeros((size, window), np.int64)
        dense = np.zeros((size, window), np.bool_)
        counted = np.zeros((size, window), np.bool_)
        names = sorted(self.sources)
        for row in range(size):
            passages = self.sources[names[rng.integers(len(names))]]
            lengths = np.array([len(passage.ids) for passage in passages], np.float64)
            passage = passages[rng.choice(len(passages), p=lengths / lengths.sum())]
            piece, prefix = _window(passage, rng, window)
            ids[row, : len(piece)] = piece
            dense[row, :prefix] = True
            counted[row, prefix : len(piece)] = True
        return Batch(ids, dense, counted)


def _window(passage: Passage, rng: np.random.Generator, window: int) -> tuple[TokenIds, int]:
    if passage.prefix is None:
        start = int(rng.integers(len(passage.ids) - window + 1))
        # Half of the windows show what a short prompt leaves, half what a longer one does.
        prefix = DENSE_POSITIONS if rng.random() < 0.5 else int(rng.integers(DENSE_POSITIONS, window // 2))
        return passage.ids[start : start + window], prefix
    # A prompt longer than the window keeps its end, as much as leaves half of the window to what follows.
    start = max(0, passage.prefix - window // 2)
    piece = passage.ids[start : start + window]
    return piece, max(passage.prefix - start, DENSE_POSITIONS)


def read_corpus(paths: Sequence[Path], tokenizer: Tokenizer, window: int, held_out: float) -> tuple[Corpus, Corpus]:
    """The plain text files among `paths` as (training, held-out) corpora: the last `held_out` share of each is held
    out. Raises RequestError for a file that is missing, not text or too short.
    """
    training, held = Corpus(), Corpus()
    for path in paths:
        ids = np.array(tokenizer.encode(read_text(path), add_special_tokens=False).ids, np.int64)
        split = int(len(ids) * (1 - held_out))
        if min(split, len(ids) - split) < window:
            raise RequestError(
                f"{path} has {len(ids)} tokens: too short to train on and to hold {held_out:.0%} out in windows of "
                f"{window}. Give more text or a smaller --window."
            )
        training.sources[path.stem] = [Passage(ids[:split])]
        held.sources[path.stem] = [Passage(ids[split:])]
    return training, held


def read_prompts(path: Path) -> list[list[dict[str, str]]]:
    """Chat prompts of a .jsonl file as message lists: each line an object with `messages`, `turns` (the first is
    taken) or `prompt`. Raises RequestError naming the line.
    """
    prompts = []
    for number, line in enumerate(read_text(path).split("\n"), 1):  # other line ends are text in JSON
        if line.strip():
            try:
                prompts.append(_messages(json.loads(line)))
            except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
                raise RequestError(
                    f'{path}, line {number}: not a prompt. Each line is {{"prompt": "..."}}, {{"turns": ["..."]}} or '
                    f'{{"messages": [{{"role": "user", "content": "..."}}]}}.'
                ) from error
    if not prompts:
        raise RequestError(f"{path} has no prompts.")
    return prompts


def _messages(record: Any) -> list[dict[str, str]]:
    if "messages" in record:
        messages = [{"role": message["role"], "content": message["content"]} for message in record["messages"]]
    else:
        messages = [{"role": "user", "content": record["turns"][0] if "turns" in record else record["prompt"]}]
    if not messages or not all(isinstance(text, str) for message in messages for text in message.values()):
        raise TypeError("not text")
    return messages


def self_generated(
    model: Any,
    text: Text,
    chats: Sequence[Sequence[Mapping[str, str]]],
    settings: TrainingSettings,
    progress: Progress = no_progress,
) -> tuple[list[Passage], list[Passage]]:
    """Continuations by `model` (transformers) of `own_prompts` of the chats, (training, held out): a `held_out` share
    of the prompts is held out, and what is judged does not follow the seed.
    """
    order = np.random.default_rng(JUDGED_SEED).permutation(len(chats))
    split = max(1, int(len(chats) * (1 - settings.held_out)))
    count = round(settings.own_prompts * (1 - settings.held_out))
    drawn = np.random.default_rng(settings.seed).permutation(order[:split])[:count]

    def continued(chosen: TokenIds, seed: int) -> list[Passage]:
        ids = [np.array(text.chat(chats[index])[-settings.window :], np.int64) for index in chosen]
        return continue_prompts(model, ids, settings.own_tokens, text.eos_ids, seed, progress)

    training = continued(drawn, settings.seed)
    held = continued(order[split:][: settings.own_prompts - count], JUDGED_SEED)
    if not held and len(training) > 1:
        held.append(training.pop())
    return training, held


def continue_prompts(
    model: Any,
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
    for start in range(0, len(order), GENERATED_BATCH):
        chosen = [prompts[index] for index in order[start : start + GENERATED_BATCH]]
        width = max(map(len, chosen))
        ids, mask = (np.zeros((len(chosen), width), np.int64) for _ in range(2))
        for row, prompt in enumerate(chosen):  # padded on the left, as generation wants it
            ids[row, width - len(prompt) :] = prompt
            mask[row, width - len(prompt) :] = 1
        made = model.generate(
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
        progress("self-generated text", min(start + GENERATED_BATCH, len(order)), len(order))
    return passages
