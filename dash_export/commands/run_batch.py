"""`dash-export run --prompts`: many prompts, several decoded together."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dash_export.cli import printable
from dash_export.errors import DashError, RequestError
from dash_export.text_files import read_stream, read_text

if TYPE_CHECKING:
    from dash_export.runtime import Batch, Response, Sampling

STANDARD_INPUT = Path("-")


def read_prompts(path: Path) -> list[str]:
    """One prompt per line; blank lines are left out. Raises RequestError where there is nothing to ask."""
    text = read_stream(sys.stdin) if path == STANDARD_INPUT else read_text(path, pipe=True)
    prompts = [line.removesuffix("\r") for line in text.split("\n") if line.strip()]
    if not prompts:
        raise RequestError(f"{path} has no prompt: give one per line.")
    return prompts


def answer_all(
    batch: Batch,
    prompts: list[str],
    encode: Callable[[str], list[int]],
    max_tokens: int | None,
    sampling: Sampling,
    as_json: Callable[[list[Response]], dict[str, object]] | None,
) -> None:
    """Print every answer when it is whole, as text or as one JSON line; the figures of all go to stderr, and so does
    why a prompt has none. Raises RequestError at the end where there is such a prompt.
    """
    count = failed = 0

    def refuse(index: int, error: DashError) -> None:
        nonlocal failed
        failed += 1
        click.echo(printable(f"{index}: the prompt {prompts[index][:40]!r} has no answer. {error}"), err=True)

    encoded: dict[int, list[int]] = {}
    for index, prompt in enumerate(prompts):
        try:
            encoded[index] = encode(prompt)
        except DashError as error:
            refuse(index, error)
    indices, began = list(encoded), time.perf_counter()
    parts: dict[int, list[Response]] = {}
    for position, response in batch.stream(encoded.values(), max_tokens, sampling):
        index = indices[position]
        if response.error is not None:
            parts.pop(index, None)
            refuse(index, response.error)
            continue
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
        f"[{len(prompts) - failed} answers, {count} tokens in {seconds:.1f} s, {count / seconds:.1f} tokens/s in all, "
        f"up to {batch.size} at a time, {batch.counters.layers_run / steps:.1f} layers/step]",
        err=True,
    )
    if failed:
        raise RequestError(f"{failed} of {len(prompts)} prompts have no answer: why stands above.")
