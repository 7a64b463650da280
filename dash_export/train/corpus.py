"""Text to learn from: windows of token ids, each with a dense prefix, as decode will see them.

A policy acts after a prompt: the prompt is dense, and what follows may be skipped. So every window says how many of its
first tokens are dense: the prompt of a chat, or a random number of tokens of a passage of text. Half of the windows are
of the model's own answers (own_answers.py), which are what a deployed policy acts on.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from dash_export.core.units import DENSE_POSITIONS
from dash_export.errors import RequestError
from dash_export.text.text_files import read_text
from dash_export.text.tokenizer import Text

OWN = "own answers"
"""The source that has the model's own answers to prompts."""
OWN_SHARE = 0.5
"""Their share of the windows."""


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
    """Passages by source. Own answers are OWN_SHARE of what is drawn; the other sources are drawn equally often,
    whatever their size; within one, passages are drawn by length.
    """

    sources: dict[str, list[Passage]] = field(default_factory=dict)

    def tokens(self) -> dict[str, int]:
        return {name: sum(len(passage.ids) for passage in passages) for name, passages in self.sources.items()}

    def parts(self) -> dict[str, "Corpus"]:
        """Return the own answers and the other texts apart, where there are any: a policy will act on the first."""
        own = {name: passages for name, passages in self.sources.items() if name == OWN}
        texts = {name: passages for name, passages in self.sources.items() if name != OWN}
        return {name: Corpus(part) for name, part in ((OWN, own), ("texts", texts)) if part}

    def frequent(self, vocab: int, most: int) -> torch.Tensor:
        """Return `most` tokens of a vocabulary, in rising order: the corpus's most frequent ones and, where it has
        fewer, those of the lowest ids, which are the earliest merges of a tokenizer.
        """
        counts = torch.zeros(vocab, dtype=torch.int64)
        for passages in self.sources.values():
            for passage in passages:
                counts += passage.ids.bincount(minlength=vocab)
        return counts.sort(descending=True, stable=True).indices[:most].sort().values

    def batch(self, rng: np.random.Generator, size: int, window: int, device: torch.device | None = None) -> Batch:
        """Draw `size` random windows of `window` tokens."""
        ids = torch.zeros(size, window, dtype=torch.int64)
        dense, counted = (torch.zeros(size, window, dtype=torch.bool) for _ in range(2))
        texts = sorted(self.sources.keys() - {OWN})
        for row in range(size):
            own = OWN in self.sources and (not texts or rng.random() < OWN_SHARE)
            passages = self.sources[OWN if own else texts[rng.integers(len(texts))]]
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
