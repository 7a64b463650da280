"""What a measurement gives for one setting over one file; `items` are windows, prompts or questions."""

from __future__ import annotations

from dataclasses import dataclass

from dash_export.decision import Setting
from dash_export.evaluation.bootstrap import Interval


@dataclass(frozen=True)
class Result:
    """`build`: the name of another build than the measured one; `layers`: mean layers run; `time`: decode time as a
    fraction of that build's dense, predicted from its cost table. Both over the `tokens` at which skipping was allowed.
    """

    build: str
    setting: Setting
    tokens: int
    layers: float
    time: float
    items: int


@dataclass(frozen=True)
class TextResult(Result):
    """`kl`: KL(dense || setting), nats per token; `perplexity_ratio`: to dense, window by window; `top1`: share of
    tokens whose most likely successor is dense's. Dense is that of the measured build.
    """

    kl: Interval
    perplexity: Interval
    perplexity_ratio: Interval
    top1: Interval


@dataclass(frozen=True)
class PromptResult(Result):
    """Greedy answers against dense's: `agreement`: tokens before the first difference; `share`: of positions that are
    equal; `identical`: share of answers equal to the end. The first token, which the dense prefill makes, is not
    counted.
    """

    agreement: Interval
    share: Interval
    identical: Interval


@dataclass(frozen=True)
class ChoiceResult(Result):
    """Multiple choice: `accuracy` by log-likelihood, `normalised` per character of the choice, `flips`: share of
    questions that are right with dense and wrong here, or the other way round (normalised; arXiv 2407.09141).
    """

    accuracy: Interval
    normalised: Interval
    flips: Interval


@dataclass(frozen=True)
class AnswerResult(Result):
    """Generated answers: `exact`: share that is the target; `flips`: right with dense and wrong here, or the other way
    round.
    """

    exact: Interval
    flips: Interval
