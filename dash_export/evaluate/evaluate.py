"""Everything asked for in one go: texts and task files, each by every candidate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dash_export.artifacts import Progress, no_progress
from dash_export.decision import Setting
from dash_export.errors import RequestError
from dash_export.evaluate import DENSE_SHARE, LIMIT, NEW_TOKENS, PREFIX, WINDOW
from dash_export.evaluate.candidates import Result, candidates
from dash_export.evaluate.task_files import Answer, Question, read_items
from dash_export.evaluate.tasks import Score, prepare_answers, prepare_choices, prepare_prompts
from dash_export.evaluate.texts import score_text, windows
from dash_export.runtime import DashRuntime
from dash_export.text_files import read_text


@dataclass(frozen=True)
class Request:
    """What to measure on. `limit`: at most so many windows, prompts or items of each file.

    `window` and `prefix` are tokens of a text's windows and of their dense beginning; `new_tokens` of an answer to a
    prompt; `dense_share` of an answer's context is dense.
    """

    texts: tuple[Path, ...] = ()
    tasks: tuple[Path, ...] = ()
    limit: int = LIMIT
    window: int = WINDOW
    prefix: int = PREFIX
    new_tokens: int = NEW_TOKENS
    dense_share: float = DENSE_SHARE


@dataclass(frozen=True)
class FileResult:
    """One file under every setting, dense first, and by other builds. `form`: `text`, `prompts`, `choices` or
    `answers`.
    """

    file: str
    form: str
    results: Sequence[Result]


def evaluate(
    runtime: DashRuntime,
    settings: Sequence[Setting],
    request: Request,
    others: Sequence[tuple[str, DashRuntime]] = (),
    progress: Progress = no_progress,
) -> list[FileResult]:
    """Read and check every file, then measure them in turn. `settings` begin with dense (`settings_at`); `others` are
    builds by their names, run dense.

    Raises RequestError for a file that cannot be used, before anything is measured.
    """
    if not request.texts and not request.tasks:
        raise RequestError("There is nothing to measure on: give a text or a task file.")
    prepared = [(path, "text", _text(runtime, path, request)) for path in request.texts]
    prepared += [(path, *_tasks(runtime, path, request)) for path in request.tasks]
    results = []
    for path, form, score in prepared:

        def said(name: str, done: int, total: int, file: str = path.name) -> None:
            progress(f"{file}: {name}", done, total)

        results.append(FileResult(path.name, form, score(candidates(runtime, settings, others), said)))
    return results


def _text(runtime: DashRuntime, path: Path, request: Request) -> Score:
    parts = windows(runtime, read_text(path), str(path), request.limit, request.window, request.prefix)
    return lambda many, progress: score_text(many, parts, request.prefix, progress)


def _tasks(runtime: DashRuntime, path: Path, request: Request) -> tuple[str, Score]:
    items: list[Any] = read_items(path, request.limit)
    name = str(path)
    if isinstance(items[0], Question):
        return "choices", prepare_choices(runtime, items, name)
    if isinstance(items[0], Answer):
        return "answers", prepare_answers(runtime, items, name, request.dense_share)
    return "prompts", prepare_prompts(runtime, items, name, request.new_tokens)
