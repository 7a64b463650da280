"""Everything asked for in one go: texts and task files, each under every setting."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dash_export.artifacts import Progress, no_progress
from dash_export.decision import Setting
from dash_export.errors import RequestError
from dash_export.evaluation import answers, choices, prompts, text
from dash_export.evaluation.data import Answer, Item, Prompt, Question, read_items
from dash_export.evaluation.matching import matched
from dash_export.evaluation.results import Result
from dash_export.evaluation.settings import Entrant, entrants
from dash_export.runtime import DashRuntime
from dash_export.text_files import read_text

LIMIT = 32


@dataclass(frozen=True)
class Request:
    """What to measure on. `limit`: at most so many windows, prompts or items of each file.

    `window` and `prefix` are tokens of a text's windows and of their dense beginning; `new_tokens` of an answer to a
    prompt; `dense_share` of an answer's context is dense. `matched`: budgets and numbers of skipped layers are meant
    for each file's own tokens, not for the calibration text (`matching`).
    """

    texts: tuple[Path, ...] = ()
    tasks: tuple[Path, ...] = ()
    limit: int = LIMIT
    window: int = text.WINDOW
    prefix: int = text.PREFIX
    new_tokens: int = prompts.NEW_TOKENS
    dense_share: float = answers.DENSE_SHARE
    matched: bool = False


_Measure = Callable[[Sequence[Entrant], Progress], Sequence[Result]]


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
    """Read and check every file, then measure them in turn. `settings` begin with dense (`settings.plan`); `others` are
    builds by their names, run dense.

    Raises RequestError for a file that cannot be used, before anything is measured.
    """
    if not request.texts and not request.tasks:
        raise RequestError("There is nothing to measure on: give a text or a task file.")
    prepared = [_text(runtime, path, request) for path in request.texts]
    prepared += [_tasks(runtime, path, request) for path in request.tasks]
    results = []
    for path, form, measure in prepared:

        def said(name: str, done: int, total: int, file: str = path.name) -> None:
            progress(f"{file}: {name}", done, total)

        found = measure(entrants(runtime, settings, others), said)
        if request.matched:
            again = partial(_again, runtime, measure, said)
            found = matched(runtime.build, found, again)
        results.append(FileResult(path.name, form, found))
    return results


def _again(
    runtime: DashRuntime, measure: _Measure, progress: Progress, settings: Sequence[Setting]
) -> Sequence[Result]:
    return measure(entrants(runtime, settings), progress)


def _text(runtime: DashRuntime, path: Path, request: Request) -> tuple[Path, str, _Measure]:
    parts = text.windows(runtime, read_text(path), str(path), request.limit, request.window)
    text.check(parts, request.prefix)
    return path, "text", lambda many, said: text.measure_text(many, parts, request.prefix, said)


def _tasks(runtime: DashRuntime, path: Path, request: Request) -> tuple[Path, str, _Measure]:
    items: list[Item] = read_items(path, request.limit)
    name = str(path)
    if isinstance(items[0], Question):
        questions = choices.encode_questions(runtime, [item for item in items if isinstance(item, Question)], name)
        return path, "choices", lambda many, said: choices.measure_choices(many, questions, said)
    if isinstance(items[0], Answer):
        found = [item for item in items if isinstance(item, Answer)]
        encoded = answers.encode_answers(runtime, found, name, request.dense_share)
        return path, "answers", lambda many, said: answers.measure_answers(many, encoded, said)
    asked = prompts.encode_prompts(
        runtime, [item for item in items if isinstance(item, Prompt)], name, request.new_tokens + 1
    )
    return path, "prompts", lambda many, said: prompts.measure_prompts(many, asked, request.new_tokens, said)
