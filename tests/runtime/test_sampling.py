"""Sampling, in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LogitsProcessorList
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from dash_export.errors import BackendError, RequestError
from dash_export.runtime.sampling import Sampler, Sampling, distribution, penalised

LOGITS = np.random.default_rng(3).standard_normal(200).astype(np.float32) * 2


def probabilities(sampling: Sampling, logits: np.ndarray = LOGITS) -> np.ndarray:
    """Over the whole vocabulary, zero where filtered."""
    full = np.zeros(logits.size)
    candidates, chances = distribution(logits, sampling)
    full[candidates] = chances
    return full


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.1}, {"repetition_penalty": 2.0}])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers(temperature: float, options: dict, value: float) -> None:
    logits = LOGITS.copy()
    logits[7] = value
    with pytest.raises(BackendError, match="not numbers"), np.errstate(invalid="ignore"):
        Sampler(Sampling(temperature, **options))(logits, [3])


def test_the_ends_of_what_may_be_asked() -> None:
    for sampling in (Sampling(1e-3, repetition_penalty=1e-2), Sampling(100.0, repetition_penalty=100.0)):
        assert 0 <= Sampler(sampling)(LOGITS * 100, [1, 2, 3]) < LOGITS.size


def test_greedy_is_argmax_and_takes_the_first_of_equals() -> None:
    assert Sampler(Sampling())(LOGITS, []) == LOGITS.argmax()
    assert Sampler(Sampling())(np.zeros(5, np.float32), []) == 0


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 0.3},
        {"temperature": 5.0},
        {"temperature": 1.0, "top_k": 1},
        {"temperature": 1.0, "top_k": 7},
        {"temperature": 1.0, "top_k": 5000},
        {"temperature": 1.0, "top_p": 0.5},
        {"temperature": 1.0, "top_p": 1e-6},
        {"temperature": 1.0, "min_p": 0.1},
        {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "min_p": 0.05},
    ],
)
def test_filters_as_hugging_face(options: dict[str, float]) -> None:
    processors = LogitsProcessorList([TemperatureLogitsWarper(float(options["temperature"]))])
    if options.get("top_k"):
        processors.append(TopKLogitsWarper(int(options["top_k"])))
    if "top_p" in options:
        processors.append(TopPLogitsWarper(options["top_p"]))
    if "min_p" in options:
        processors.append(MinPLogitsWarper(options["min_p"]))
    scores = processors(torch.zeros(1, 1, dtype=torch.long), torch.from_numpy(LOGITS.astype(np.float64))[None])
    expected = torch.softmax(scores, dim=-1)[0].numpy()
    np.testing.assert_allclose(probabilities(Sampling(**options)), expected, atol=1e-9)  # type: ignore[arg-type]


def test_repetition_penalty_as_hugging_face() -> None:
    context = [3, 3, 7, 11, 199]
    expected = RepetitionPenaltyLogitsProcessor(1.4)(torch.tensor([context]), torch.from_numpy(LOGITS.copy())[None])
    np.testing.assert_allclose(penalised(LOGITS, context, 1.4), expected[0].numpy(), rtol=1e-6)


def test_logits_are_left_alone() -> None:
    before = LOGITS.copy()
    Sampler(Sampling(temperature=0.8, top_k=5, repetition_penalty=2.0, seed=0))(LOGITS, [1, 2])
    np.testing.assert_array_equal(LOGITS, before)


def test_seed_decides() -> None:
    def draw(seed: int | None) -> list[int]:
        sampler = Sampler(Sampling(temperature=1.0, seed=seed))
        return [sampler(LOGITS, []) for _ in range(50)]

    assert draw(5) == draw(5)
    assert draw(5) != draw(6)
    assert draw(None) != draw(None)


def test_draws_follow_the_distribution() -> None:
    sampling = Sampling(temperature=1.2, top_p=0.9, seed=0)
    sampler, count = Sampler(sampling), 20_000
    drawn = np.bincount([sampler(LOGITS, []) for _ in range(count)], minlength=LOGITS.size)
    expected = probabilities(sampling) * count
    assert not drawn[expected == 0].any()
    likely = expected > 5
    chi_squared = float((((drawn - expected) ** 2)[likely] / expected[likely]).sum())
    degrees = int(likely.sum())
    assert chi_squared < degrees + 5 * np.sqrt(2 * degrees)


def test_extreme_logits_stay_finite() -> None:
    logits = np.array([1e4, -1e4, 9.9e3, -3e38], np.float32)
    candidates, chances = distribution(logits, Sampling(temperature=0.01))
    assert np.isfinite(chances).all()
    assert candidates[0] == 0
    assert Sampler(Sampling(temperature=0.01, seed=0))(logits, []) == 0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", float("nan")),
        ("min_p", 1.0),
        ("min_p", -0.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", float("nan")),
        ("stop", ("",)),
        ("seed", -1),
    ],
)
def test_bad_settings(field: str, value: object) -> None:
    with pytest.raises(RequestError, match=field):
        Sampling(**{field: value})  # type: ignore[arg-type]
