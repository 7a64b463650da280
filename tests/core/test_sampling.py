"""Sampling, in numpy."""

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

from dash_export.core.sampling import (
    Sampler,
    Sampling,
    distribution,
    drawn,
    most_likely,
    with_bias,
    with_repetition_penalty,
)
from dash_export.errors import BackendError, RequestError

LOGITS = np.random.default_rng(3).standard_normal(200).astype(np.float32) * 2


def probabilities(sampling: Sampling) -> np.ndarray:
    """Over the whole vocabulary, zero where filtered."""
    full = np.zeros(LOGITS.size)
    candidates, weights = distribution(LOGITS, sampling)
    full[slice(None) if candidates is None else candidates] = weights / weights.sum(dtype=np.float64)
    return full


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.1}, {"repetition_penalty": 2.0}])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers(temperature: float, options: dict, value: float) -> None:
    logits = LOGITS.copy()
    logits[7] = value
    with pytest.raises(BackendError, match="not numbers"), np.errstate(invalid="ignore"):
        Sampler(Sampling(temperature, **options))(logits, [3])


def test_greedy_is_argmax_and_takes_the_first_of_equals() -> None:
    assert Sampler(Sampling())(LOGITS, []) == LOGITS.argmax()
    assert Sampler(Sampling())(np.zeros(5, np.float32), []) == 0


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.3},
        {"temperature": 5.0},
        {"temperature": 1.0, "top_k": 1},
        {"temperature": 1.0, "top_k": 5000},
        {"temperature": 1.0, "top_p": 0.5},
        {"temperature": 1.0, "top_p": 1e-6},
        {"temperature": 1.0, "min_p": 0.1},
        {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "min_p": 0.05},
    ],
)
def test_filters_as_hugging_face(options: dict[str, float]) -> None:
    """Up to the rounding of float32, in which both are computed."""
    warpers = {"temperature": TemperatureLogitsWarper, "top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper}
    processors = LogitsProcessorList([(warpers | {"min_p": MinPLogitsWarper})[name](options[name]) for name in options])
    scores = processors(torch.zeros(1, 1, dtype=torch.long), torch.from_numpy(LOGITS.astype(np.float64))[None])
    expected = torch.softmax(scores, dim=-1)[0].numpy()
    np.testing.assert_allclose(probabilities(Sampling(**options)), expected, atol=1e-7)  # type: ignore[arg-type]


@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.95, 0.9999])
@pytest.mark.parametrize("spread", [0.0, 0.01, 2.5, 30.0])
def test_the_smallest_set_of_a_large_vocabulary(top_p: float, spread: float) -> None:
    """As a sort of all of it in float64 gives it, up to the rounding of float32."""
    logits = np.random.default_rng(1).standard_normal(5000).astype(np.float32) * np.float32(spread)
    order = np.argsort(-logits, kind="stable")
    chances = np.exp(logits[order].astype(np.float64) - logits.max())
    chances /= chances.sum()
    before = np.concatenate([[0.0], chances.cumsum()[:-1]])
    expected = order[before < top_p]
    candidates, found = distribution(logits, Sampling(1.0, top_p=top_p))
    assert candidates is not None
    assert (np.diff(candidates) > 0).all(), "in the order of the vocabulary, in which a device draws"
    ranks = np.argsort(-logits[candidates], kind="stable")
    candidates, found = candidates[ranks], found[ranks]
    assert abs(len(candidates) - len(expected)) <= (0 if spread > 1 else 1), "of near equals, one more or less"
    both = min(len(candidates), len(expected))
    np.testing.assert_allclose(logits[candidates[:both]], logits[expected[:both]], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found / found.max(), chances[: len(found)] / chances[0], rtol=1e-5)


def test_repetition_penalty_as_hugging_face() -> None:
    context = [3, 3, 7, 11, 199]
    expected = RepetitionPenaltyLogitsProcessor(1.4)(torch.tensor([context]), torch.from_numpy(LOGITS.copy())[None])
    before = LOGITS.copy()
    np.testing.assert_allclose(with_repetition_penalty(LOGITS, context, 1.4), expected[0].numpy(), rtol=1e-6)
    np.testing.assert_array_equal(LOGITS, before)


def test_a_bias_is_added() -> None:
    before, shift = LOGITS.copy(), {3: 2.5, 199: -100.0}
    found = with_bias(LOGITS, shift) - LOGITS
    assert {token: pytest.approx(found[token], abs=1e-4) for token in np.flatnonzero(found).tolist()} == shift
    np.testing.assert_array_equal(LOGITS, before)
    assert Sampler(Sampling(logit_bias={7: 100.0}))(LOGITS, []) == 7
    assert Sampler(Sampling(logit_bias={7: 100.0})).draw is None, "a device must not draw without it"
    with pytest.raises(RequestError, match=f"from 0 to {LOGITS.size - 1}, not {LOGITS.size}"):
        Sampler(Sampling(logit_bias={LOGITS.size: 1.0}))(LOGITS, [])


def test_draws_follow_the_distribution_and_the_seed() -> None:
    def draw(seed: int | None, count: int) -> list[int]:
        sampler = Sampler(Sampling(temperature=1.2, top_p=0.9, seed=seed))
        return [sampler(LOGITS, []) for _ in range(count)]

    drawn = np.bincount(draw(0, 20_000), minlength=LOGITS.size)
    expected = probabilities(Sampling(temperature=1.2, top_p=0.9)) * 20_000
    assert not drawn[expected == 0].any()
    likely = expected > 5
    chi_squared = float((((drawn - expected) ** 2)[likely] / expected[likely]).sum())
    degrees = int(likely.sum())
    assert chi_squared < degrees + 5 * np.sqrt(2 * degrees)
    assert draw(5, 50) == draw(5, 50) != draw(6, 50)
    assert draw(None, 50) != draw(None, 50)


@pytest.mark.parametrize("count", [1, 511, 512, 513, 5000])
def test_a_draw_is_where_the_running_sum_passes_its_share(count: int) -> None:
    """Never where a weight is zero: a grammar forbids such tokens."""
    rng = np.random.default_rng(count)
    weights = np.where(rng.random(count) < 0.3, rng.random(count) ** 8, 0).astype(np.float32)
    weights[count // 2] = 1
    sums = weights.cumsum(dtype=np.float64)
    shares = [0.0, np.nextafter(1.0, 0), *rng.random(300), *(sums[:-1] / sums[-1])[:300]]
    for share in shares:
        place = drawn(weights, share)
        assert weights[place] > 0
        assert sums[place] - weights[place] - 1e-5 <= share * sums[-1] <= sums[place] + 1e-5


def test_extreme_logits_stay_finite() -> None:
    logits = np.array([1e4, -1e4, 9.9e3, -3e38], np.float32)
    for options in ({"temperature": 1e-3, "repetition_penalty": 1e-2}, {"temperature": 0.01, "seed": 0}):
        assert Sampler(Sampling(**options))(logits, [1]) == 0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", 1.0),
        ("repetition_penalty", 0.0),
        ("stop", ("",)),
        ("stop", ("x",) * 17),  # each costs every token of everybody
        ("stop", ("x" * 257,)),
        ("seed", -1),
    ],
)
def test_bad_settings(field: str, value: object) -> None:
    with pytest.raises(RequestError, match=field):
        Sampling(**{field: value})  # type: ignore[arg-type]


def test_penalties_of_what_the_answer_holds() -> None:
    """OpenAI's: by how often a token is there, and by that it is; the prompt does not count."""
    logits = np.array([3.0, 2.5, 2.4, 0.0], np.float32)
    sampler = Sampler(Sampling(frequency_penalty=0.3, presence_penalty=0.1))
    context, taken = [0, 0, 0], []
    for _ in range(6):
        taken.append(sampler(logits, context))
        context.append(taken[-1])
    # 3.0; 3.0 - 0.4 = 2.6; 3.0 - 0.7 = 2.3 < 2.5; 2.5 - 0.4 = 2.1 < 2.4; then 2.3, then 2.1 against 2.0
    assert taken == [0, 0, 1, 2, 0, 1]
    assert logits.tolist() == [3.0, 2.5, np.float32(2.4), 0.0]


def test_embeddings_have_no_token_to_penalise() -> None:
    logits = np.array([1.0, 2.0, 3.0], np.float32)
    np.testing.assert_array_equal(with_repetition_penalty(logits, [-1, 1, -1], 2.0), [1.0, 1.0, 3.0])


def test_likelihoods_of_a_token_and_of_the_best() -> None:
    logits = np.array([1.0, 3.0, 2.0, -1.0], np.float32)
    exact = logits - np.logaddexp.reduce(logits.astype(np.float64))
    for count in (0, 2, 4):
        found = most_likely(logits, 3, count)
        assert [token for token, _ in found] == [3, 1, 2, 0, 3][: 1 + count]
        np.testing.assert_allclose([value for _, value in found], [exact[token] for token, _ in found])
