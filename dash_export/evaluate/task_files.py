"""Task files: one JSON object a line, in one of two forms. Everything in them is checked before anything is measured.

    {"query": ..., "choices": [..., ...], "gold": 0}    multiple choice: log P(" " + choice | query)
    {"context": ..., "target": ...}                     an answer to be generated: LAMBADA's last word, exact matches

Other keys are not read.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from dash_export.errors import RequestError
from dash_export.text_files import lines, read_text

MAX_LINE, MAX_CHOICES = 1 << 20, 256
FORMS = '{"query", "choices", "gold"} or {"context", "target"}'


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


Item = Question | Answer


def read_items(path: Path, limit: int | None = None) -> list[Item]:
    """Return the first `limit` items of a task file, all of one form.

    Raises RequestError that names file and line for a file that is missing, empty, not UTF-8, not JSON lines, or of
    another form.
    """
    items: list[Item] = []
    for number, line in enumerate(lines(read_text(path)), 1):
        if len(items) == limit:
            break
        if not line.strip():
            continue
        item = _item(line, number, f"{path}:{number}")
        if items and type(item) is not type(items[0]):
            raise RequestError(
                f"{path}:{number} is of another form than line {items[0].line}: keep one form to a file ({FORMS})."
            )
        items.append(item)
    if not items:
        raise RequestError(f"{path} is empty: it needs one JSON object a line, as {FORMS}.")
    return items


def _item(line: str, number: int, where: str) -> Item:
    if len(line) > MAX_LINE:
        raise RequestError(f"{where} is over {MAX_LINE} characters long: one item a line.")
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
        if not isinstance(choices, list) or not 2 <= len(choices) <= MAX_CHOICES:
            raise RequestError(f"{where}: 'choices' must be a list of 2 to {MAX_CHOICES} texts.")
        if type(gold) is not int or not 0 <= gold < len(choices):
            raise RequestError(f"{where}: 'gold' must be the index of the right choice, 0 to {len(choices) - 1}.")
        texts = tuple(text(choice, f"choices[{index}]") for index, choice in enumerate(choices))
        return Question(number, text(data["query"], "query"), texts, gold)
    if "context" in data:
        return Answer(number, text(data["context"], "context"), text(data.get("target"), "target"))
    raise RequestError(f"{where} has none of the known forms: expected {FORMS}.")
