"""How long a greedy answer stays the dense one: the difference that a user sees first."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dash_export.artifacts import Progress, no_progress
from dash_export.errors import RequestError
from dash_export.evaluation.bootstrap import interval
from dash_export.evaluation.data import Prompt
from dash_export.evaluation.results import PromptResult
from dash_export.evaluation.settings import Entrant
from dash_export.runtime import DashRuntime

TokenIds = npt.NDArray[np.int64]
NEW_TOKENS = 64


def encode_prompts(runtime: DashRuntime, prompts: Sequence[Prompt], name: str, new_tokens: int) -> list[list[int]]:
    """Token ids, in the model's chat template when it has one. Raises RequestError for one that leaves no room."""
    encoded = []
    for prompt in prompts:
        message = [{"role": "user", "content": prompt.text}]
        ids = runtime.text.chat(message) if runtime.text.template is not None else runtime.text.encode(prompt.text)
        longest = runtime.engines.model.max_positions
        if not 0 < len(ids) <= longest - new_tokens:
            raise RequestError(
                f"{name}:{prompt.line} is a prompt of {len(ids)} tokens: with {new_tokens} new ones it must fit the "
                f"model's context of {longest}."
            )
        encoded.append(ids)
    return encoded


def measure_prompts(
    entrants: Sequence[Entrant],
    prompts: Sequence[Sequence[int]],
    new_tokens: int = NEW_TOKENS,
    progress: Progress = no_progress,
) -> list[PromptResult]:
    """Greedy answers of up to `new_tokens` + 1 tokens by every entrant, compared token by token with those of the
    first, which is dense.
    """
    figures = np.zeros((len(entrants), len(prompts), 3))
    for number, ids in enumerate(prompts):
        expected = None
        for index, entrant in enumerate(entrants):
            made = entrant.session().generate(ids, new_tokens + 1)
            expected = made.tokens if expected is None else expected
            entrant.took(made.actions[1:])
            figures[index, number] = compare(expected[1:], made.tokens[1:])
            progress("prompts", number * len(entrants) + index + 1, len(prompts) * len(entrants))
    return [
        PromptResult(*entrant.figures(), len(prompts), *(interval(column) for column in measured.T))
        for entrant, measured in zip(entrants, figures, strict=True)
    ]


def compare(expected: TokenIds, made: TokenIds) -> tuple[int, float, bool]:
    """Tokens before the first difference; share of positions of the longer answer that are equal; whether all are."""
    shorter, longer = sorted((len(expected), len(made)))
    same = expected[:shorter] == made[:shorter]
    differs = np.flatnonzero(~same)
    agreement = int(differs[0]) if differs.size else shorter
    return agreement, float(same.sum() / longer) if longer else 1.0, shorter == longer and not differs.size
