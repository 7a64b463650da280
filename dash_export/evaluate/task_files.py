"""Task files: one JSON object a line, in one of three forms. Everything in them is checked before anything is measured.

    {"query": ..., "choices": [..., ...], "gold": 0}    multiple choice: log P(" " + choice | query)
    {"context": ..., "target": ...}                     an answer to be generated: LAMBADA's last word, exact matches
    {"prompt": ...} or {"turns": [...]}                 a prompt: how long the greedy answer agrees with dense

Other keys are not read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dash_export.errors import RequestError

MAX_LINE = 1 << 20
FORMS = '{"query", "choices", "gold"}, {"context", "target"}, {"prompt"} or {"turns"}'


@dataclass(frozen=True)
class Question:
    """Multiple choice; `gold` is the right choice's index."""

    line: int
    query: str
    choices: tuple[str, ...]
    gold: int


@dataclass(frozen=True)
class Answer:
    """A context and the text that should follow it."""

    line: int
    context: str
    target: str


@dataclass(frozen=True)
class Prompt:
    """The first user message of a conversation."""

    line: int
    text: str


Item = Question | Answer | Prompt


def read_items(path: Path, limit: int | None = None) -> list[Item]:
    """The first `limit` items of a task file, all of one form.

    Raises RequestError that names file and line for a file that is missing, empty, not UTF-8, not JSON lines, or of
    another form.
    """
    items: list[Item] = []
    for number, line in _lines(path):
        item = _item(line, number, f"{path}:{number}")
        if items and type(item) is not type(items[0]):
            raise RequestError(
                f"{path}:{number} is of another form than line {items[0].line}: keep one form to a file ({FORMS})."
            )
        items.append(item)
        if len(items) == limit:
            break
    if not items:
        raise RequestError(f"{path} is empty: it needs one JSON object a line, as {FORMS}.")
    return items


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    if not path.is_file():  # nor a pipe, which would be waited for
        raise RequestError(f"There is no task file {path}.")
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE), ""), 1):
                if len(line) == MAX_LINE:
                    raise RequestError(f"{path}:{number} is over {MAX_LINE} characters long: one item a line.")
                if line.strip():
                    yield number, line
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not UTF-8 text ({error.reason}): give a file of JSON lines.") from error
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}.") from error


def _item(line: str, number: int, where: str) -> Item:
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{where} is not JSON ({error}): one object a line, as {FORMS}.") from error
    if not isinstance(data, dict):
        raise RequestError(f"{where} is not a JSON object: expected {FORMS}.")

    def text(value: object, name: str) -> str:
        if not isinstance(value, str) or not value.strip():
            raise RequestError(f"{where}: {name!r} must be text that is not empty.")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise RequestError(f"{where}: {name!r} has half a character in it ({error.reason}).") from error
        return value

    if "query" in data:
        choices, gold = data.get("choices"), data.get("gold")
        if not isinstance(choices, list) or len(choices) < 2:
            raise RequestError(f"{where}: 'choices' must be a list of two or more texts.")
        texts = tuple(text(choice, f"choices[{index}]") for index, choice in enumerate(choices))
        if type(gold) is not int or not 0 <= gold < len(texts):
            raise RequestError(f"{where}: 'gold' must be the index of the right choice, 0 to {len(texts) - 1}.")
        return Question(number, text(data["query"], "query"), texts, gold)
    if "context" in data:
        return Answer(number, text(data["context"], "context"), text(data.get("target"), "target"))
    if "prompt" in data:
        return Prompt(number, text(data["prompt"], "prompt"))
    if "turns" in data:
        turns = data["turns"]
        if not isinstance(turns, list) or not turns:
            raise RequestError(f"{where}: 'turns' must be a list of one or more texts.")
        return Prompt(number, text(turns[0], "turns[0]"))
    raise RequestError(f"{where} has none of the known forms: expected {FORMS}.")
