"""Files of chats: prompts, and prompts with the model's own answers, which are what a policy is judged on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dash_export.errors import RequestError
from dash_export.text.text_files import lines, read_text
from dash_export.text.tokenizer import Text

if TYPE_CHECKING:
    from dash_export.core.sampling import TokenIds

MAX_PROMPT, MAX_PROMPTS = 1 << 20, 1 << 18
"""Letters of a line, and number of lines."""
FORMS = (
    '{"prompt": "..."}, {"turns": ["..."]} or {"messages": [{"role": "user", "content": "..."}]}, which may have an '
    '"answer"'
)


DIAL_ANSWERS = 16
"""The first answers of a bundle set its dial; the others are there to judge it."""


class Chat(NamedTuple):
    """A prompt: the messages that it begins with, and the user's later turns, each after an answer. `answer`: the
    model's own to the messages, where it is known.
    """

    messages: list[dict[str, str]]
    later: tuple[str, ...] = ()
    answer: str | None = None


class Continuation(NamedTuple):
    """A prompt and its answer, as token ids int64 [tokens]; the first `prefix` are the prompt, which is dense."""

    ids: TokenIds
    prefix: int


def read_prompts(path: Path) -> list[Chat]:
    """Read the chats of a .jsonl file: each line is an object with `prompt`, `turns` (the user's, one after the other)
    or `messages`; with the first two, `system` is a system prompt. Raises RequestError that names the line.
    """
    return parsed_chats(read_text(path), str(path))


def parsed_chats(text: str, name: str) -> list[Chat]:
    """Return the chats of the text of such a file. Raises RequestError that names the line."""
    chats: list[Chat] = []
    for number, line in enumerate(lines(text), 1):  # other line ends are text in JSON
        if line.strip():
            if len(line) > MAX_PROMPT or len(chats) == MAX_PROMPTS:
                raise RequestError(f"{name}, line {number}: {MAX_PROMPTS} prompts of {MAX_PROMPT} letters at most.")
            try:
                chats.append(_chat(json.loads(line)))
            except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
                raise RequestError(f"{name}, line {number}: not a prompt. Each line is {FORMS}.") from error
    if not chats:
        raise RequestError(f"{name} has no prompts.")
    return chats


def _chat(record: Any) -> Chat:
    later: list[str] = []
    if "messages" in record:
        messages = [{"role": message["role"], "content": message["content"]} for message in record["messages"]]
    else:
        turns = record["turns"] if "turns" in record else [record["prompt"]]
        if not isinstance(turns, list):
            raise TypeError("no list")
        messages = [{"role": "system", "content": record["system"]}] if "system" in record else []
        messages.append({"role": "user", "content": turns[0]})
        later = turns[1:]
    answer = record.get("answer")
    texts = [*later, *([] if answer is None else [answer]), *(text for each in messages for text in each.values())]
    if not messages or not all(isinstance(text, str) for text in texts):
        raise TypeError("not text")
    "".join(texts).encode()  # raises for half a character
    return Chat(messages, tuple(later), answer)


def chats_text(answered: Iterable[tuple[Sequence[Mapping[str, str]], str]]) -> str:
    """Return the text of a file of conversations, each with its answer."""
    records = ({"messages": [*messages], "answer": answer} for messages, answer in answered)
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def continuation(text: Text, chat: Chat, longest: int, tokens: int) -> Continuation | None:
    """Return an answered chat as token ids, with at most `tokens` of the answer; None where the model's context of
    `longest` tokens does not hold it, or where the answer has fewer than two tokens.
    """
    assert chat.answer is not None
    prompt = text.chat(chat.messages)
    answer = text.encode(chat.answer, special=False)[:tokens]
    if len(prompt) + len(answer) > longest or len(answer) < 2 or len(prompt) < 2:
        return None
    return Continuation(np.array([*prompt, *answer], np.int64), len(prompt))
