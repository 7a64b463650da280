"""`dash-export run --prompts`: many prompts, several decoded together."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dash_export.commands.run_output import printable
from dash_export.errors import DashError, RequestError
from dash_export.text_files import read_text

if TYPE_CHECKING:
    from dash_export.runtime import Batch, Response, Sampling

STANDARD_INPUT = Path("-")


def read_prompts(path: Path) -> list[str]:
    """One prompt per line; blank lines are left out. Raises RequestError where there is nothing to ask."""
    try:
        text = sys.stdin.read() if path == STANDARD_INPUT else read_text(path, pipe=True)
    except UnicodeDecodeError as error:
        raise RequestError(f"What comes in is not UTF-8 text ({error}): give one prompt per line.") from error
    prompts = [line.removesuffix("\r") for line in text.split("\n") if line.strip()]
    if not prompts:
        raise RequestError(f"{path} has no prompt: give one per line.")
    return prompts


def answer_all(
    batch: Batch,
    prompts: list[str],
    encoded: list[list[int]],
    max_tokens: int | None,
    sampling: Sampling,
    as_json: Callable[[list[Response]], dict[str, object]] | None,
) -> None:
    """Print every answer when it is whole, as text or as one JSON line; the figures of all go to stderr. A prompt that
    cannot be answered is refused before any is begun.
    """
    for prompt, ids in zip(prompts, encoded, strict=True):
        try:
            batch.checked(ids, max_tokens)
        except DashError as error:
            raise RequestError(f"The prompt {prompt[:40]!r} cannot be answered. {error}") from error
    began = time.perf_counter()
    count = 0
    parts: dict[int, list[Response]] = {}
    for index, response in batch.stream(encoded, max_tokens, sampling):
        count += 1
        parts.setdefault(index, []).append(response)
        if response.finish_reason is not None:
            responses = parts.pop(index)
            if as_json is not None:
                click.echo(json.dumps({"index": index, **as_json(responses)}, ensure_ascii=False))
            else:
                answer = "".join(piece.text for piece in responses)
                click.secho(f"{index}: {prompts[index]}", bold=True)
                click.echo((printable(answer) if sys.stdout.isatty() else answer) + "\n")
    seconds = time.perf_counter() - began
    steps = max(1, batch.counters.decode_steps)
    click.echo(
        f"[{len(prompts)} answers, {count} tokens in {seconds:.1f} s, {count / seconds:.1f} tokens/s in all, up to "
        f"{batch.size} at a time, {batch.counters.layers_run / steps:.1f} layers/step]",
        err=True,
    )
