"""Answers with drafts beside answers without, each prompt in turns: what drafts gain here, and where a tie fell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dash_export.core.sampling import Sampling
from dash_export.files.artifacts import Progress, no_progress
from dash_export.measure.timing import in_turns
from dash_export.runtime import DashRuntime, Response


@dataclass(frozen=True)
class Drafted:
    """Answers to some prompts, and tokens per second [prompts], medians over rounds."""

    plain: list[list[Response]]
    drafted: list[list[Response]]
    plain_rates: list[float]
    drafted_rates: list[float]

    @property
    def plain_rate(self) -> float:
        return float(np.median(self.plain_rates))

    @property
    def drafted_rate(self) -> float:
        return float(np.median(self.drafted_rates))

    @property
    def ratio(self) -> float:
        """The median over prompts of the one rate over the other."""
        return float(np.median(np.divide(self.drafted_rates, self.plain_rates)))


def drafted_beside_plain(
    runtime: DashRuntime,
    prompts: Sequence[str],
    tokens: int,
    rounds: int = 1,
    sampling: Sampling | None = None,
    draft: str = "auto",
    progress: Progress = no_progress,
) -> Drafted:
    """Answer each prompt with drafts and without, `rounds` times each, after one that warms up. Prompts are put into
    the chat template where there is one.
    """
    sampling, sessions = sampling or Sampling(logprobs=1), [runtime.session(draft=kind) for kind in ("off", draft)]
    answers: list[list[list[Response]]] = [[[], []] for _ in prompts]
    rates = np.zeros((len(prompts), 2, rounds))
    for place, prompt in enumerate(prompts):
        for number, index in in_turns(2, rounds + (place == 0), progress, "drafts"):
            session = sessions[index]
            session.reset()
            asked = [{"role": "user", "content": prompt}]
            given = runtime.text.template is not None
            stream = session.chat(asked, tokens, sampling) if given else session.stream(prompt, tokens, sampling)
            answers[place][index] = [*stream]
            rates[place, index, number % rounds] = answers[place][index][-1].statistics.tokens_per_second
    medians = np.median(rates, axis=2)
    plain, drafted = ([each[kind] for each in answers] for kind in (0, 1))
    return Drafted(plain, drafted, medians[:, 0].tolist(), medians[:, 1].tolist())


def tie(plain: Sequence[Response], drafted: Sequence[Response]) -> str:
    """Say that two answers, with `logprobs`, are the same, or how near the choices were at which they part: a pass of
    several rows rounds otherwise than one of one row, and neither is nearer to the exact result.
    """
    pairs = enumerate(zip(plain, drafted, strict=False), 1)
    place, pair = next(((at, pair) for at, pair in pairs if pair[0].token != pair[1].token), (0, None))
    if pair is None:
        return "The text is the same."
    other = max((nats for token, nats in pair[1].logprobs if token == pair[0].token), default=None)
    apart = "" if other is None else f", {abs(pair[1].logprobs[0][1] - other):.2f} nats apart"
    return f"The text is the same up to token {place}, where two choices were as good as equal{apart}."
