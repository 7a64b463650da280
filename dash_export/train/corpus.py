"""Text to learn from: windows of token ids, each with a dense prefix, as decode will see them.

A policy acts after a prompt: the prompt is dense, and what follows may be skipped. So every window says how many of its
first tokens are dense: the prompt of a chat, or a random number of tokens of a passage of prose. Self-generated text,
continuations of chat prompts by the model, is what a deployed policy acts on.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from dash_export.artifacts import Progress, no_progress
from dash_export.decision import DENSE_POSITIONS
from dash_export.errors import RequestError
from dash_export.runtime.text import Text
from dash_export.text_files import lines, read_text
from dash_export.train import TrainingSettings

SHORTEST = 16
"""Fewer continuation tokens than this are not worth a row of a batch."""
GENERATED_BATCH, TEMPERATURE = 32, 0.7
SELF_GENERATED = "self-generated"
JUDGED_SEED = 20252
"""Seed of the held-out data. It is not the seed of the training, so that trainings can be compared."""


class Batch(NamedTuple):
    """Windows of text. ids int64 [batch, tokens]; dense and counted bool [batch, tokens]: tokens that run every layer,
    and tokens whose divergence counts: those past the prefix that are text, not padding.
    """

    ids: torch.Tensor
    dense: torch.Tensor
    counted: torch.Tensor


class Passage(NamedTuple):
    """One piece of text as token ids int64 [tokens]. `prefix`: length of its prompt, None for prose without a prompt;
    windows of prose begin with `beginning`.
    """

    ids: torch.Tensor
    prefix: int | None = None
    beginning: tuple[int, ...] = ()


@dataclass
class Corpus:
    """Passages by source. All sources are drawn equally often, whatever their size; within one, by length."""

    sources: dict[str, list[Passage]] = field(default_factory=dict)

    def tokens(self) -> dict[str, int]:
        """Return the number of tokens per source."""
        return {name: sum(len(passage.ids) for passage in passages) for name, passages in self.sources.items()}

    def batch(self, rng: np.random.Generator, size: int, window: int, device: torch.device | None = None) -> Batch:
        """Draw `size` random windows of `window` tokens."""
        ids = torch.zeros(size, window, dtype=torch.int64)
        dense, counted = (torch.zeros(size, window, dtype=torch.bool) for _ in range(2))
        names = sorted(self.sources)
        for row in range(size):
            passages = self.sources[names[rng.integers(len(names))]]
            lengths = np.array([len(passage.ids) for passage in passages], np.float64)
            piece, prefix = _window(passages[rng.choice(len(passages), p=lengths / lengths.sum())], rng, window)
            ids[row, : len(piece)] = piece
            dense[row, :prefix] = True
            counted[row, prefix : len(piece)] = True
        return Batch(*(part.to(device) for part in (ids, dense, counted)))


def _window(passage: Passage, rng: np.random.Generator, window: int) -> tuple[torch.Tensor, int]:
    if passage.prefix is None:
        start = int(rng.integers(len(passage.ids) - window + 1))
        # Half of the windows stand for text after a short prompt, half for text after a longer one.
        prefix = DENSE_POSITIONS if rng.random() < 0.5 else int(rng.integers(DENSE_POSITIONS, window // 2))
        first = torch.tensor(passage.beginning, dtype=torch.int64)
        return torch.cat([first, passage.ids[start : start + window - len(first)]]), prefix
    # A long prompt is shortened, so that half of the window is left to the continuation.
    prompt = kept_places(passage.prefix, window // 2)
    places = [*prompt, *range(passage.prefix, len(passage.ids))]
    return passage.ids[places[:window]], max(len(prompt), DENSE_POSITIONS)


def kept_places(tokens: int, most: int) -> list[int]:
    """Return the places of a prompt's tokens that are kept, at most `most`: a quarter from its beginning (a BOS, the
    head of the chat template), the others from its end.
    """
    if tokens <= most:
        return [*range(tokens)]
    first = most // 4
    return [*range(first), *range(tokens - most + first, tokens)]


def read_corpus(paths: Sequence[Path], text: Text, window: int, held_out: float) -> tuple[Corpus, Corpus]:
    """Read plain text files as (training, held-out) corpora: the last `held_out` share of each file is held out. Raises
    RequestError for a file that is missing, not text or too short.
    """
    beginning = tuple(text.beginning.tolist())
    if window < len(beginning) + DENSE_POSITIONS + 2:
        raise RequestError(
            f"A --window of {window} tokens holds no text: the tokenizer begins it with {len(beginning)}."
        )
    training, held = Corpus(), Corpus()
    for path in paths:
        ids = torch.tensor(text.encode(read_text(path), special=False))
        split = int(len(ids) * (1 - held_out))
        if min(split, len(ids) - split) < window:
            raise RequestError(
                f"{path} has {len(ids)} tokens: too short to train on and to hold {held_out:.0%} out in windows of "
                f"{window}. Give more text or a smaller --window."
            )
        training.sources[path.stem] = [Passage(ids[:split], beginning=beginning)]
        held.sources[path.stem] = [Passage(ids[split:], beginning=beginning)]
    return training, held


MAX_PROMPT, MAX_PROMPTS = 1 << 20, 1 << 18


def read_prompts(path: Path) -> list[list[dict[str, str]]]:
    """Read the chat prompts of a .jsonl file as message lists: each line is an object with `messages`, `turns` (the
    first is taken) or `prompt`. Raises RequestError that names the line.
    """
    prompts: list[list[dict[str, str]]] = []
    for number, line in enumerate(lines(read_text(path)), 1):  # other line ends are text in JSON
        if line.strip():
            if len(line) > MAX_PROMPT or len(prompts) == MAX_PROMPTS:
                raise RequestError(f"{path}, line {number}: {MAX_PROMPTS} prompts of {MAX_PROMPT} letters at most.")
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
        turns = record["turns"] if "turns" in record else [record["prompt"]]
        if not isinstance(turns, list):
            raise TypeError("no list")
        messages = [{"role": "user", "content": turns[0]}]
    if not messages or not all(isinstance(text, str) for message in messages for text in message.values()):
        raise TypeError("not text")
    "".join(text for message in messages for text in message.values()).encode()  # raises for half a character
    return messages


def self_generated(
    model: Any,
    text: Text,
    chats: Sequence[Sequence[Mapping[str, str]]],
    settings: TrainingSettings,
    progress: Progress = no_progress,
) -> tuple[list[Passage], list[Passage]]:
    """Return continuations by `model` (transformers) of `own_prompts` of the chats, as (training, held out). A
    `held_out` share of the prompts is held out; which ones these are does not depend on the training's seed.
    """
    order = np.random.default_rng(JUDGED_SEED).permutation(len(chats))
    split = max(1, int(len(chats) * (1 - settings.held_out)))
    count = round(settings.own_prompts * (1 - settings.held_out))
    chosen = [*np.random.default_rng(settings.seed).permutation(order[:split])[:count]]
    judged = [*order[split:][: settings.own_prompts - count]]
    made: list[list[Passage]] = []
    for places, seed in ((chosen, settings.seed), (judged, JUDGED_SEED)):
        torch.manual_seed(seed)
        # Prompts of like length share a batch.
        asked = (text.chat(chats[place]) for place in places)
        prompts = sorted(([ids[at] for at in kept_places(len(ids), settings.window)] for ids in asked), key=len)
        if not all(prompts):
            raise RequestError("The model's chat template makes nothing of a prompt: learn from text (--text) alone.")
        made.append([])
        for start in range(0, len(prompts), GENERATED_BATCH):
            batch = prompts[start : start + GENERATED_BATCH]
            made[-1] += _continued(model, batch, settings.own_tokens, text.eos_ids)
            done = len(chosen) * (len(made) - 1) + start + len(batch)
            progress(f"{SELF_GENERATED} text", done, len(chosen) + len(judged))
    training, held = made
    if not held and len(training) > 1:
        held.append(training.pop())
    return training, held


def _continued(model: Any, prompts: Sequence[Sequence[int]], tokens: int, ends: frozenset[int]) -> list[Passage]:
    """Sample up to `tokens` tokens after each prompt, densely; leave out continuations shorter than SHORTEST."""
    width = max(map(len, prompts))
    ids, mask = (torch.zeros(len(prompts), width, dtype=torch.int64) for _ in range(2))
    for row, prompt in enumerate(prompts):  # padded on the left, as generation wants it
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    # What enters the head after a prompt is a slice. For that torch copies the weight for every row: 8.7 GB for a 0.5B.
    with model.lm_head.register_forward_pre_hook(lambda _head, given: (given[0].contiguous(),)):
        made = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=tokens,
            do_sample=True,
            temperature=TEMPERATURE,
            top_k=0,
            eos_token_id=sorted(ends) or None,
            pad_token_id=0,
        ).cpu()
    passages = []
    for prompt, row in zip(prompts, made[:, width:], strict=True):
        end = next((place + 1 for place, token in enumerate(row.tolist()) if token in ends), len(row))
        if end >= SHORTEST:
            passages.append(Passage(torch.cat([torch.tensor(prompt), row[:end]]), len(prompt)))
    return passages
