"""The model's own answers to chat prompts: what a deployed policy decodes, so what it has to learn from.

Half of the prompts are answered greedily, half at TEMPERATURE; later turns follow on the model's answers. Batches are
large, because a product with many rows costs little more; rows whose answer has ended leave the batch.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import DynamicCache

from dash_export.errors import RequestError
from dash_export.models import DecoderSpec
from dash_export.models.torch_model import logits_of
from dash_export.text.chats import Chat
from dash_export.text.tokenizer import Text
from dash_export.train.corpus import OWN, Passage, kept_places
from dash_export.train.stages import Run

SHORTEST = 16
"""Tokens. A shorter answer is not worth a row of a batch."""
JUDGED_SEED = 20252
"""Seed of the held-out data. It is not the seed of the training, so that trainings can be compared."""
TEMPERATURE = 0.7
BATCH = 64
"""Rows of a batch."""
FULL = 0.75
"""Share of a batch's rows that still write; below it the others are taken out."""


class Answer(NamedTuple):
    """An answer as a passage of ids int64 [tokens], and the conversation that it answers."""

    passage: Passage
    messages: list[dict[str, str]]
    text: str


class _Talk(NamedTuple):
    place: int
    held_out: bool
    messages: list[dict[str, str]]
    later: tuple[str, ...]


def own_answers(run: Run, text: Text, chats: Sequence[Chat]) -> tuple[list[Answer], list[Answer]]:
    """Return the model's answers to `own_prompts` of the chats, as (training, held out). Which prompts are held out
    does not depend on the training's seed. Each batch is saved, and a resumed training reads it.
    """
    settings = run.settings
    order = np.random.default_rng(JUDGED_SEED).permutation(len(chats))
    split = max(1, int(len(chats) * (1 - settings.held_out)))
    judged = order[split:][: max(1, round(settings.own_prompts * settings.held_out))]
    chosen = np.random.default_rng(settings.seed).permutation(order[:split])[: settings.own_prompts - len(judged)]
    parts = ((False, chosen), (True, judged))
    talks = [_Talk(int(place), held, *chats[place][:2]) for held, part in parts for place in part]
    total, done = sum(1 + len(talk.later) for talk in talks), 0
    found: tuple[list[Answer], list[Answer]] = ([], [])
    for turn in range(max((1 + len(talk.later) for talk in talks), default=0)):
        asked = [(talk, _prompt(text, talk.messages, settings.window)) for talk in talks]
        asked.sort(key=lambda one: len(one[1]))  # prompts of like length share a batch
        talks = []
        for start in range(0, len(asked), BATCH):
            batch = asked[start : start + BATCH]
            rows = []
            for talk, prompt in batch:
                seed = JUDGED_SEED if talk.held_out else settings.seed
                rows.append(Row(prompt, (seed, talk.place, turn), greedy=(talk.place + turn) % 2 == 0))
            made = _answered(run, text, rows, f"own-{turn}-{start}", done, total)
            for (talk, prompt), ids in zip(batch, made, strict=True):
                answer = text.decode(ids)
                if len(ids) >= SHORTEST:
                    passage = Passage(torch.tensor([*prompt, *ids]), len(prompt))
                    found[talk.held_out].append(Answer(passage, talk.messages, answer))
                if talk.later:
                    said = [{"role": "assistant", "content": answer}, {"role": "user", "content": talk.later[0]}]
                    talks.append(talk._replace(messages=[*talk.messages, *said], later=talk.later[1:]))
            done += len(batch)
    if not found[1] and len(found[0]) > 1:
        found[1].append(found[0].pop())
    return found


def _prompt(text: Text, messages: Sequence[dict[str, str]], most: int) -> list[int]:
    ids = text.chat(messages)
    if not ids:
        raise RequestError("The model's chat template makes nothing of a prompt: learn from text (--text) alone.")
    return [ids[at] for at in kept_places(len(ids), most)]


def _answered(run: Run, text: Text, rows: Sequence["Row"], stage: str, done: int, total: int) -> list[list[int]]:
    tokens = run.settings.own_tokens

    def each(step: int, made: list[list[int]]) -> None:
        run.progress(OWN, done * tokens + step * len(rows), total * tokens)
        run.work.save_if_due(f"{stage}-part", lambda: made)

    def make() -> list[list[int]]:
        model, part = run.model, run.work.kept(f"{stage}-part") or ()
        run.progress(OWN, done * tokens, total * tokens)  # reading the prompts may take a minute
        made = answers(model.model, model.spec, rows, tokens, text.eos_ids, part, each)
        run.progress(OWN, (done + len(rows)) * tokens, total * tokens)
        return made

    return run.work.once(stage, make)


class Row(NamedTuple):
    """A prompt [tokens], the seed of its random draws, and whether it takes the likeliest token instead. Tokens less
    likely than `least` of the likeliest are not drawn.
    """

    prompt: Sequence[int]
    seed: tuple[int, ...]
    greedy: bool
    temperature: float = TEMPERATURE
    least: float = 0.0


@torch.no_grad()
def answers(
    model: Any,
    spec: DecoderSpec,
    rows: Sequence[Row],
    tokens: int,
    ends: frozenset[int],
    made: Sequence[Sequence[int]] = (),
    each: Callable[[int, list[list[int]]], None] = lambda *_: None,
) -> list[list[int]]:
    """Return up to `tokens` tokens after each prompt, with the token that ends the answer. `model` is of transformers.

    `made` are the first tokens of the answers, of a call that was interrupted; `each` is called after every token with
    the length of the longest answer and with the answers so far.
    """
    answers = [list(answer) for answer in made] or [list[int]() for _ in rows]
    live = [place for place, answer in enumerate(answers) if not _ended(answer, tokens, ends)]
    if not live:
        return answers
    logits, cache, mask = _begun(model, spec, [[*rows[place].prompt, *answers[place]] for place in live])
    for step in range(max(map(len, answers)) + 1, tokens + 1):
        chosen = chosen_tokens(logits, [rows[place] for place in live], [len(answers[place]) for place in live])
        for place, token in zip(live, chosen, strict=True):
            if not _ended(answers[place], tokens, ends):
                answers[place].append(token)
        each(step, answers)
        going = [at for at, place in enumerate(live) if not _ended(answers[place], tokens, ends)]
        if not going:
            break
        if len(going) <= FULL * len(live):
            kept = torch.tensor(going, device=mask.device)
            cache.batch_select_indices(kept)
            mask, live, chosen = mask[kept], [live[at] for at in going], [chosen[at] for at in going]
        mask = torch.cat([mask, mask.new_ones(len(live), 1)], 1)
        logits = _step(model, spec, torch.tensor(chosen, device=mask.device)[:, None], cache, mask)
    return answers


def _ended(answer: Sequence[int], tokens: int, ends: frozenset[int]) -> bool:
    return len(answer) >= tokens or (bool(answer) and answer[-1] in ends)


def _begun(
    model: Any, spec: DecoderSpec, texts: Sequence[Sequence[int]]
) -> tuple[torch.Tensor, DynamicCache, torch.Tensor]:
    """Return the logits after each text, the cache, and the attention mask [rows, tokens]: padded on the left."""
    ids, mask = padded(texts, model.device)
    cache = DynamicCache(config=model.config)
    return _step(model, spec, ids, cache, mask), cache, mask


def padded(texts: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the ids and the attention mask [rows, tokens] of texts, padded on the left."""
    width = max(map(len, texts))
    ids, mask = (torch.zeros(len(texts), width, dtype=torch.int64, device=device) for _ in range(2))
    for row, text in enumerate(texts):
        ids[row, width - len(text) :] = torch.tensor(text)
        mask[row, width - len(text) :] = 1
    return ids, mask


def _step(model: Any, spec: DecoderSpec, ids: torch.Tensor, cache: DynamicCache, mask: torch.Tensor) -> torch.Tensor:
    return last_logits(model, spec, final_states(model, ids, cache, mask))


def final_states(model: Any, ids: torch.Tensor, cache: DynamicCache, mask: torch.Tensor) -> torch.Tensor:
    """Return the normed final states [rows, tokens, hidden] of the next ids [rows, tokens]."""
    positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
    states: torch.Tensor = model.model(ids, mask, positions, cache, use_cache=True).last_hidden_state
    return states  # the cache is given by place: its name has changed


def last_logits(model: Any, spec: DecoderSpec, states: torch.Tensor) -> torch.Tensor:
    """Return the logits [rows, vocab] float32 after the last of states [rows, tokens, hidden]."""
    # What enters the head is made contiguous: for a slice torch copies the weight for every row, 8.7 GB for a 0.5B.
    return logits_of(model, states[:, -1].contiguous(), spec.traits).float()


def chosen_tokens(logits: torch.Tensor, rows: Sequence[Row], places: Sequence[int]) -> list[int]:
    """Return a token per row. A draw depends on the row's seed and place only: not on other rows, nor on a restart."""
    found = logits.argmax(-1)
    drawn = [at for at, row in enumerate(rows) if not row.greedy]
    if drawn:
        options = torch.tensor([(rows[at].temperature, rows[at].least) for at in drawn], device=logits.device)
        chances = (logits[drawn] / options[:, :1]).softmax(-1)
        sums = chances.masked_fill(chances < options[:, 1:] * chances.amax(-1, keepdim=True), 0).cumsum(-1)
        shares = [np.random.default_rng([*rows[at].seed, places[at]]).random() for at in drawn]
        wanted = torch.tensor(shares, dtype=sums.dtype, device=sums.device)[:, None] * sums[:, -1:]
        found[drawn] = torch.searchsorted(sums, wanted)[:, 0].clamp_max(logits.shape[-1] - 1)
    return [int(token) for token in found]
