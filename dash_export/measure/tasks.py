"""Evaluation of texts and task files in one call, by every candidate; task files and their measures."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dash_export.core.units import DENSE_POSITIONS, Actions
from dash_export.errors import RequestError
from dash_export.files.artifacts import Progress, no_progress
from dash_export.measure import DENSE_SHARE, LIMIT, PREFIX, WINDOW
from dash_export.measure.candidates import Candidate
from dash_export.measure.intervals import Floats, interval
from dash_export.measure.score import Figures, Measure, Result, Row, TextScore, score
from dash_export.measure.texts import judged_text
from dash_export.runtime import DashRuntime
from dash_export.text.text_files import lines, read_text

SPARE_TOKENS = 3
"""Tokens decoded beyond the target's own: a word may be split otherwise, and its end must be seen."""
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
    """Return the first `limit` items of a task file: one JSON object a line, all in one of two forms.

        {"query": ..., "choices": [..., ...], "gold": 0}    multiple choice: log P(" " + choice | query)
        {"context": ..., "target": ...}                     an answer to generate: LAMBADA's last word, exact matches

    Other keys are not read. Raises RequestError that names file and line for a file that is missing, empty, not UTF-8,
    not JSON lines, or of another form.
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


def evaluate(
    candidates: Sequence[Candidate],
    texts: Sequence[Path | None],
    tasks: Sequence[Path],
    limit: int = LIMIT,
    window: int = WINDOW,
    prefix: int = PREFIX,
    progress: Progress = no_progress,
) -> list[tuple[str, str, list[Result]]]:
    """Return (name, form, results) of every file; forms are `text`, `choices` and `answers`. All files are read and
    checked before the first is measured. A text None is the default of `judged_text`. `limit`: most windows or items
    of each; `window` and `prefix`: tokens of a text's windows and of their dense beginning. Raises RequestError for a
    file that cannot be used.
    """
    runtime, measures = candidates[0].runtime, list[tuple[str, Measure]]()
    for path in texts:
        text = judged_text(runtime, path, limit, window, prefix, progress)
        measures.append((text.name, TextScore(text.items)))
    for path in tasks:
        items: Any = read_items(path, limit)
        kind = ChoiceScore if isinstance(items[0], Question) else AnswerScore
        measures.append((path.name, kind(runtime, items, str(path))))
    found = []
    for name, measure in measures:
        results = score(measure, candidates, lambda form, *done, file=name: progress(f"{file}: {form}", *done))
        found.append((name, measure.form, results))
    return found


class ChoiceScore(Measure):
    """Multiple choice: the likeliest continuation of the query. `accuracy` by log-likelihood, `normalised` per
    character of the choice; `flips`: share of questions that are right with dense and wrong with the candidate, or the
    other way round (normalised; arXiv 2407.09141).

    The query is dense, like a prompt, so the first token of a choice is predicted densely; the rest of the choice is
    under the setting, as in decode. Raises RequestError for a question that the model's context does not hold or a
    choice without a token of its own.
    """

    form = "choices"

    def __init__(self, runtime: DashRuntime, questions: Sequence[Question], name: str) -> None:
        longest = runtime.engines.model.max_positions
        self.items: list[tuple[Question, list[tuple[list[int], int]]]] = []
        for question in questions:
            pairs, where = list[tuple[list[int], int]](), f"{name}:{question.line}"
            for choice in question.choices:
                ids, context = encode_pair(runtime, question.query, f" {choice}")
                if len(ids) > longest:
                    raise RequestError(
                        f"{where} has {len(ids)} tokens with a choice; the model's context holds {longest}."
                    )
                if not 0 < context < len(ids):
                    raise RequestError(f"{where}: the choice {choice!r:.60} has no token of its own.")
                pairs.append((ids, context))
            self.items.append((question, pairs))

    def row(self, candidate: Candidate, item: tuple[Question, list[tuple[list[int], int]]], dense: Any) -> Row:
        question, pairs = item
        likelihoods, actions = zip(*(likelihood(candidate, *pair) for pair in pairs), strict=True)
        per_letter = np.array(likelihoods) / [len(choice) for choice in question.choices]
        right = (float(np.argmax(each) == question.gold) for each in (likelihoods, per_letter))
        return tuple(right), np.concatenate(actions), dense

    def figures(self, own: Floats, dense: Floats) -> Figures:
        return {
            "accuracy": interval(own[0]),
            "normalised": interval(own[1]),
            "flips": interval(own[1] != dense[1]),
        }


def encode_pair(runtime: DashRuntime, context: str, continuation: str) -> tuple[list[int], int]:
    """Return the token ids of context and continuation together, and how many of them are the context's.

    As in lm-eval, spaces at the end of the context belong to the continuation, and the whole is tokenised at once.
    Raises ContextLengthError, before encoding, for a text far over the model's context.
    """
    kept, limit = context.rstrip(), runtime.engines.model.max_positions
    whole = runtime.text.encode(context + continuation, limit=limit)
    return whole, len(runtime.text.encode(kept)) if kept else 0


def likelihood(candidate: Candidate, ids: list[int], context: int) -> tuple[float, Actions]:
    """Return log P(ids after the first `context` | the first `context`), nats, and the actions that were free."""
    found = candidate.session().score(ids, prefix=context)
    total = float(found.log_likelihoods[context - 1 :].sum(dtype=np.float64))
    return total, found.actions[max(context, DENSE_POSITIONS) : -1]


class AnswerScore(Measure):
    """Greedy answers that are compared with a target. `exact`: share that is the target; `flips`: share that is right
    with dense and wrong with the candidate, or the other way round.

    The first DENSE_SHARE of a context is dense like a prompt; the rest goes through decode one token at a time under
    the setting, as if the model had written it. Were the whole context dense, skipping could not touch the first token
    of an answer, and most of LAMBADA's last words are one token. Raises RequestError for what does not fit the context.
    """

    form = "answers"

    def __init__(self, runtime: DashRuntime, answers: Sequence[Answer], name: str) -> None:
        longest = runtime.engines.model.max_positions
        self.items = []
        for answer in answers:
            ids = runtime.text.encode(answer.context.rstrip())
            new_tokens = len(runtime.text.encode(f" {answer.target.strip()}", special=False)) + SPARE_TOKENS
            if len(ids) + new_tokens > longest:
                raise RequestError(
                    f"{name}:{answer.line} needs {len(ids)} + {new_tokens} tokens; the model's context holds {longest}."
                )
            dense = min(len(ids), max(DENSE_POSITIONS, round(DENSE_SHARE * len(ids))))
            self.items.append((answer.target, ids[:dense], ids[dense:], new_tokens))

    def row(self, candidate: Candidate, item: tuple[str, list[int], list[int], int], dense: Any) -> Row:
        target, prompt, known, new_tokens = item
        made, actions = answered(candidate, prompt, known, new_tokens)
        return (float(matches(made, target)),), actions, dense

    def figures(self, own: Floats, dense: Floats) -> Figures:
        return {"exact": interval(own[0]), "flips": interval(own[0] != dense[0])}


def answered(candidate: Candidate, prompt: list[int], known: list[int], new_tokens: int) -> tuple[str, Actions]:
    """Return the text of up to `new_tokens` generated tokens, and the actions of all decoded tokens. `prompt` is
    prefilled densely; then the `known` tokens are decoded, before the first token is generated.
    """
    session, made, taken = candidate.session(), list[int](), list[Actions]()
    logits, waiting = session.prefill(prompt), list(known)
    while True:
        if not waiting:
            made.append(int(logits.argmax()))
            if len(made) == new_tokens or made[-1] in session.text.eos_ids:
                break
            waiting = made[-1:]
        logits, actions = session.decode_one(waiting.pop(0))
        taken.append(actions)
    return session.text.decode(made), np.array(taken, np.int8).reshape(-1, session.engines.model.num_layers)


def matches(made: str, target: str) -> bool:
    """Return whether a generated text begins with the target, as whole words."""
    made, target = made.lstrip(), target.strip()
    following = made[len(target) : len(target) + 1]
    return made.startswith(target) and not (target[-1].isalnum() and following.isalnum())
