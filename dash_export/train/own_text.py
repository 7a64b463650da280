"""Text that a model writes for itself, with its states: what a drafter learns from, without any text of a user's.

An empty user turn of the model's own template, or one begun with a word or two of BEGINNINGS, is continued into a
prompt (Magpie, arXiv 2406.08464), which the model answers. A model without a template continues a BOS or those words.
States, K and V are those of the passes that write.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from transformers import DynamicCache

from dash_export.errors import RequestError
from dash_export.text.chats import Chat
from dash_export.text.tokenizer import Text
from dash_export.train import DrafterSettings
from dash_export.train.corpus import kept_places
from dash_export.train.model import GatedModel
from dash_export.train.own_answers import FULL, Row, answers, chosen_tokens, final_states, last_logits, padded

REPEATED = 12
"""Tokens. An answer that repeats so many ends there: it would go on like that."""
SHORTEST = 4
"""Tokens of a prompt or of an answer. Texts with shorter ones are left out."""
LEAST = 0.05
"""Share of the likeliest token's probability that a token of a prompt has at least."""
_MARK = "\N{PLACE OF INTEREST SIGN}" * 2
BEGINNINGS = (
    *("", "", "", "", "", "", "", "", "Write a Python function", "How", "What", "Why", "Write a", "Explain", "Given"),
    *("Fix", "Implement", "Summarize", "Can you", "I", "Create", "Describe", "Compare", "Translate", "def", "Give me"),
    *("Tell me", "Write an email", "Write a story", "Plan", "List", "My"),
)


class Written(NamedTuple):
    """A text that the model has read: ids int64 [tokens]; of each its normed final state [tokens, hidden] and, of the
    last layer, K as in the cache and V [kv heads, tokens, head]. `start`: the first token of the answer.
    """

    ids: torch.Tensor
    states: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    start: int


def own_text(
    gated: GatedModel, text: Text, settings: DrafterSettings, number: int, chats: Sequence[Chat] = ()
) -> list[Written]:
    """Return batch `number` of the model's texts: `rows` of them, or its answers to `chats`. Half are greedy, half are
    drawn. Raises RequestError for a chat template that a prompt cannot be made for.
    """
    rng, seed = np.random.default_rng([settings.seed, number]), (settings.seed, number)
    begun = [
        text.encode(BEGINNINGS[place], special=False) for place in rng.integers(len(BEGINNINGS), size=settings.rows)
    ]
    most = settings.answer_tokens
    if chats:
        prompts = [text.chat(chat.messages) for chat in chats]
    elif text.template is None:
        prompts = [[*text.beginning.tolist(), *words] or [int(rng.integers(gated.spec.vocab_size))] for words in begun]
        most += settings.prompt_tokens
    else:
        before, after = _turn(text)
        asked = [Row([*before, *words], (*seed, 0, at), False, 1.0, LEAST) for at, words in enumerate(begun)]
        made = answers(gated.model, gated.spec, asked, settings.prompt_tokens, text.eos_ids)
        prompts = []
        for words, ids in zip(begun, made, strict=True):
            said = words + (ids[:-1] if ids[-1] in text.eos_ids else ids)
            if len(said) >= SHORTEST:
                prompts.append([*before, *said, *after])
    prompts = sorted(([prompt[at] for at in kept_places(len(prompt), most)] for prompt in prompts), key=len)
    rows = [Row(prompt, (*seed, 1, at), at % 2 == 0) for at, prompt in enumerate(prompts) if prompt]
    found = written(gated, rows, most, text.eos_ids) if rows else []
    return [each for each in found if len(each.ids) - each.start >= SHORTEST]


def _turn(text: Text) -> tuple[list[int], list[int]]:
    """Return what the chat template puts before a user's first words and after them, up to the answer."""
    assert text.template is not None
    before, mark, after = text.template.render([{"role": "user", "content": _MARK}]).partition(_MARK)
    if not mark:
        raise RequestError("The model's chat template changes what a user says: give prompts (--prompts) or --text.")
    return text.encode(before, special=False), text.encode(after, special=False)


@torch.no_grad()
def written(gated: GatedModel, rows: Sequence[Row], most: int, ends: frozenset[int]) -> list[Written]:
    """Let the model write up to `most` tokens after each prompt, to a token of `ends` or a repetition."""
    model, cache = gated.model, DynamicCache()  # not of the config: a layer with a window would drop what is behind it
    ids, mask = padded([row.prompt for row in rows], gated.device)
    texts, found = [list(row.prompt) for row in rows], dict[int, Written]()
    live, ended, parts = list(range(len(rows))), set[int](), list[torch.Tensor]()
    while True:
        parts.append(final_states(model, ids, cache, mask))
        counts = [len(texts[place]) - len(rows[place].prompt) for place in live]
        chosen = chosen_tokens(last_logits(model, gated.spec, parts[-1]), [rows[place] for place in live], counts)
        for place, token in zip(live, chosen, strict=True):
            if place not in ended:
                texts[place].append(token)
                answer = texts[place][len(rows[place].prompt) :]
                if len(answer) >= most or token in ends or _repeats(answer):
                    ended.add(place)
        going = [at for at, place in enumerate(live) if place not in ended]
        if len(going) <= FULL * len(live):  # as in `answers`: rows that have ended leave
            parts = [torch.cat(parts, 1)]
            for at, place in enumerate(live):
                if place in ended:
                    found[place] = _cut(texts[place], len(rows[place].prompt), parts[0][at], cache, at, mask[at])
            if not going:
                return [found[place] for place in range(len(rows))]
            kept = torch.tensor(going, device=gated.device)
            cache.batch_select_indices(kept)
            parts, mask = [parts[0][kept]], mask[kept]
            live, chosen = [live[at] for at in going], [chosen[at] for at in going]
        mask = torch.cat([mask, mask.new_ones(len(live), 1)], 1)
        ids = torch.tensor(chosen, device=gated.device)[:, None]


def _repeats(answer: Sequence[int]) -> bool:
    last = answer[-REPEATED:]
    return any(answer[at : at + REPEATED] == last for at in range(len(answer) - REPEATED))


def _cut(
    ids: Sequence[int], start: int, states: torch.Tensor, cache: DynamicCache, row: int, mask: torch.Tensor
) -> Written:
    """Return the text of a row: without its padding, and without the last token, which no pass has read."""
    first = int((mask == 0).sum())
    part, layer = slice(first, first + len(ids) - 1), cache.layers[-1]
    keys, values = (each[row, :, part].cpu().clone() for each in (layer.keys, layer.values))
    return Written(torch.tensor(ids[:-1]), states[part].cpu().clone(), keys, values, start)


@torch.no_grad()
def read_windows(gated: GatedModel, windows: Sequence[np.ndarray]) -> list[Written]:
    """Return windows of plain text, as the model reads them."""
    batch, cache = [window.tolist() for window in windows], DynamicCache()
    ids, mask = padded(batch, gated.device)
    states = final_states(gated.model, ids, cache, mask)
    return [_cut([*text, 0], 1, states[row], cache, row, mask[row]) for row, text in enumerate(batch)]
