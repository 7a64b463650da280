"""Sequences decoded together get what they get alone, whoever else is there, comes or goes."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from dash_export import DashRuntime
from dash_export.errors import BackendError, ContextLengthError, PolicyError, RequestError
from dash_export.runtime import Batch, Generation, Response, Sampling
from dash_export.runtime.cache import KVCache
from dash_export.runtime.decode import BoundStep
from dash_export.runtime.engine_set import EngineSet
from dash_export.runtime.results import NO_TOKEN
from dash_export.runtime.rules import DENSE
from dash_export.runtime.sampling import Sampler
from tests.runtime.prompts import prompts
from tests.runtime.test_kinds import setting_of
from tests.tiny import random_ids

LoadRuntime = Callable[..., DashRuntime]
PROMPTS = [random_ids(length, seed=length) for length in (12, 1, 40, 7, 25, 2)]


def assert_as_alone(runtime: DashRuntime, together: list[Generation], **options: Any) -> None:
    for prompt, generation in zip(PROMPTS, together, strict=True):
        alone = runtime.generate(prompt, **options)
        np.testing.assert_array_equal(generation.tokens, alone.tokens)
        np.testing.assert_array_equal(generation.actions, alone.actions)
        assert (generation.text, generation.finish_reason) == (alone.text, alone.finish_reason)


@pytest.mark.parametrize("kind", ["dense", "static", "token"])
def test_as_alone(kind: str, tiny_runtime: LoadRuntime) -> None:
    runtime = tiny_runtime()
    setting = setting_of(runtime, kind)
    together = runtime.generate_batch(PROMPTS, 20, size=3, **setting)
    assert_as_alone(runtime, together, max_tokens=20, **setting)
    skipped = [generation.actions.sum(axis=0).tolist() for generation in together]
    assert (kind == "dense") == (not np.any(skipped))
    if kind == "token":
        assert any(one != other for one, other in pairwise(skipped)), "rows decide differently"


def test_they_end_at_different_times(tiny_runtime: LoadRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    """An end of turn frees a place in the middle: the last row moves there, and the next prompt comes in."""
    runtime = tiny_runtime()
    plain = [runtime.generate(prompt, 30).tokens for prompt in PROMPTS]
    monkeypatch.setattr(runtime.text, "eos_ids", frozenset(int(tokens[3 + 4 * i]) for i, tokens in enumerate(plain)))
    together = runtime.generate_batch(PROMPTS, 30, size=3)
    assert len({len(generation.tokens) for generation in together}) > 2
    assert_as_alone(runtime, together, max_tokens=30)


def test_a_first_token_may_be_the_last(tiny_runtime: LoadRuntime) -> None:
    runtime = tiny_runtime()
    together = runtime.generate_batch(PROMPTS, 1, size=2)
    assert [len(generation.tokens) for generation in together] == [1] * len(PROMPTS)
    assert_as_alone(runtime, together, max_tokens=1)


def test_the_cache_grows_under_them(tiny_runtime: LoadRuntime) -> None:
    runtime = tiny_runtime()
    trade_off = runtime.build.dial[5].trade_off
    porch = runtime.session(trade_off=trade_off)
    porch.kv_step = 16
    assert isinstance(runtime.engines, EngineSet)
    batch = Batch(runtime.engines, porch, 3)
    tokens: dict[int, list[int]] = {}
    for index, response in batch.stream(PROMPTS, 40):
        tokens.setdefault(index, []).append(response.token)
    assert batch.counters.cache_growths > 1
    for index, prompt in enumerate(PROMPTS):
        alone = runtime.generate(prompt, 40, trade_off=trade_off)
        assert tokens[index] == alone.tokens.tolist()


def test_sampling_as_alone(tiny_runtime: LoadRuntime) -> None:
    runtime, sampling = tiny_runtime(), Sampling(1.0, top_p=0.9, repetition_penalty=1.2, seed=3, stop=("e",))
    together = runtime.generate_batch(PROMPTS, 25, sampling, size=4)
    assert {generation.finish_reason for generation in together} == {"stop", "length"}
    assert_as_alone(runtime, together, max_tokens=25, sampling=sampling)


def test_a_common_beginning_is_computed_once(tiny_runtime: LoadRuntime) -> None:
    runtime = tiny_runtime()
    beginning = random_ids(50, seed=9)
    asked = [np.concatenate([beginning, random_ids(5, seed=seed)]) for seed in range(4)]
    setting = setting_of(runtime, "token")
    batch = runtime.batch(4, **setting)
    tokens: dict[int, list[int]] = {}
    for index, response in batch.stream(asked, 10):
        tokens.setdefault(index, []).append(response.token)
    assert batch.prompts.counters.prefill_tokens <= 50 + 4 * 5
    for index, prompt in enumerate(asked):
        assert tokens[index] == runtime.generate(prompt, 10, **setting).tokens.tolist()


def test_prompts_are_taken_when_there_is_room(tiny_runtime: LoadRuntime) -> None:
    taken = []

    def arriving() -> Any:
        for prompt in PROMPTS:
            taken.append(len(prompt))
            yield prompt

    stream = tiny_runtime().batch(2).stream(arriving(), 5)
    assert taken == []
    next(stream), next(stream), next(stream)
    assert len(taken) == 2
    assert len(list(stream)) == 5 * len(PROMPTS) - 3


def test_a_generator_that_has_nothing_now_holds_nobody_up(tiny_runtime: LoadRuntime) -> None:
    """It waits for the first answer before it gives the second prompt."""
    runtime, got = tiny_runtime(), []

    def arriving() -> Any:
        yield PROMPTS[0]
        while len(got) < 10:
            yield None
        yield None
        yield PROMPTS[1]

    answers: dict[int, list[int]] = {0: [], 1: []}
    for index, response in runtime.batch(4).stream(arriving(), 12):
        got.append(index)
        answers[index].append(response.token)
    assert got[:10] == [0] * 10
    for index in answers:
        assert answers[index] == runtime.generate(PROMPTS[index], 12).tokens.tolist()


def test_one_stream_at_a_time(tiny_runtime: LoadRuntime) -> None:
    """A second one takes the rows over, and the first says so instead of giving wrong tokens."""
    runtime = tiny_runtime()
    batch = runtime.batch(2)
    first = batch.stream(PROMPTS[:2], 20)
    next(first), next(first)
    second = list(batch.stream(PROMPTS[2:4], 20))
    with pytest.raises(RequestError, match="Another stream of this batch"):
        next(first)
    for index, prompt in enumerate(PROMPTS[2:4]):
        tokens = [response.token for which, response in second if which == index]
        assert tokens == runtime.generate(prompt, 20).tokens.tolist()


def test_a_batch_goes_on_after_an_abandoned_stream_and_an_error(tiny_runtime: LoadRuntime) -> None:
    runtime = tiny_runtime()
    batch = runtime.batch(3, trade_off=runtime.build.dial[5].trade_off)
    abandoned = batch.stream(PROMPTS, 20)
    for _ in range(7):
        next(abandoned)
    abandoned.close()

    def failing() -> Any:
        yield PROMPTS[0]
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):  # the caller's own, as it is
        list(batch.stream(failing(), 20))
    tokens: dict[int, list[int]] = {}
    for index, response in batch.stream(PROMPTS, 20):
        tokens.setdefault(index, []).append(response.token)
    for index, prompt in enumerate(PROMPTS):
        alone = runtime.generate(prompt, 20, trade_off=runtime.build.dial[5].trade_off)
        assert tokens[index] == alone.tokens.tolist()
    assert batch._cache.lengths == [0] * 3, "rows that nobody has are not copied when the cache grows"


def test_cancelling_one(tiny_runtime: LoadRuntime) -> None:
    runtime = tiny_runtime()
    batch = runtime.batch(3)
    answers: dict[int, list[Any]] = {index: [] for index in range(3)}
    for index, response in batch.stream(PROMPTS[:3], 20):
        answers[index].append(response)
        if index == 1 and len(answers[1]) == 5:
            batch.cancel(1)
    assert [len(each) for each in answers.values()] == [20, 6, 20]
    assert answers[1][-1].finish_reason == "cancelled"
    again = list(batch.stream(PROMPTS[:2], 20))
    assert len(again) == 2 * 20, "a new stream counts anew"


def test_cancelling_before_the_first_token(tiny_runtime: LoadRuntime) -> None:
    batch = tiny_runtime().batch(2)
    answers = batch.stream(PROMPTS[:2], 20)
    batch.cancel(0)
    found = [(index, response.finish_reason) for index, response in answers]
    assert found[0] == (0, "cancelled")
    assert len(found) == 1 + 20


@pytest.mark.parametrize("extra", [{"hold": True}, {"max_layers": 5}])
def test_rules_that_remember_and_bound(extra: dict[str, Any], tiny_runtime: LoadRuntime) -> None:
    runtime = tiny_runtime()
    dial = runtime.build.dial
    setting = {"budget": dial[len(dial) // 2].time, **extra}
    together = runtime.generate_batch(PROMPTS, 40, size=3, **setting)
    assert_as_alone(runtime, together, max_tokens=40, **setting)


def test_as_many_tokens_as_there_is_room(tiny_runtime: LoadRuntime) -> None:
    """Each prompt has its own."""
    asked = [random_ids(440), random_ids(20), random_ids(511)]
    together = tiny_runtime().generate_batch(asked, None, size=3)
    assert [len(generation.tokens) for generation in together] == [72, 256, 1]


def test_steps_that_are_kept(tiny_runtime: LoadRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step holds the logits of all its rows: the full one stays, of the others the last."""
    runtime = tiny_runtime()
    plain = [runtime.generate(prompt, 30).tokens for prompt in PROMPTS]
    monkeypatch.setattr(runtime.text, "eos_ids", frozenset(int(tokens[3 + 4 * i]) for i, tokens in enumerate(plain)))
    batch = runtime.batch(5)
    seen = set()
    for _ in batch.stream(PROMPTS, 30):
        seen |= set(batch._steps)
        assert len(batch._steps) <= 2
    assert len(seen) > 3


def test_skipping_together_saves_what_all_skip(tiny_runtime: LoadRuntime) -> None:
    """A layer runs when any sequence runs it: counted in the batch's steps, not in what each sequence took."""
    runtime = tiny_runtime()
    batch = runtime.batch(3, **setting_of(runtime, "token"))
    responses = list(batch.stream(PROMPTS[:3], 60))
    own = np.mean([6 - response.actions.sum() for _, response in responses[3:]])
    assert own < 5.5
    assert own < batch.counters.layers_run / batch.counters.decode_steps < 6
    same = runtime.batch(3, **setting_of(runtime, "static"))
    list(same.stream(PROMPTS[2:5], 10))
    assert same.counters.layers_run == 4 * same.counters.decode_steps


def test_statistics(tiny_runtime: LoadRuntime) -> None:
    (*_, generation) = tiny_runtime().generate_batch(PROMPTS[:3], 6, size=3)
    figures = generation.statistics
    assert (figures.prompt_tokens, figures.tokens, figures.decode_steps) == (40, 6, 5)
    assert figures.tokens_per_second > 0
    assert figures.prefill_seconds > 0


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        ([], RequestError, "empty"),
        ("", RequestError, "empty"),
        ([300], RequestError, "from 0 to 299"),
        ([[1, 2]], RequestError, "one list"),
        (7, RequestError, "one list"),
        (random_ids(500), ContextLengthError, "500 prompt tokens and 20 new ones"),
    ],
)
def test_a_bad_prompt(
    prompt: Any,
    error: type[Exception],
    message: str,
    tiny_runtime: LoadRuntime,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a list of prompts all are looked at before any is begun; of a stream each when its turn comes, and those that
    cannot be answered end alone.
    """
    runtime = tiny_runtime()
    answers: dict[int, list[Response]] = {}
    for index, response in runtime.batch(2).stream([PROMPTS[0], prompt, PROMPTS[1]], 20):
        answers.setdefault(index, []).append(response)
    (refused,) = answers.pop(1)
    assert (refused.finish_reason, refused.token, type(refused.error)) == ("error", NO_TOKEN, error)
    with pytest.raises(error, match=message):
        raise refused.error  # type: ignore[misc]
    for index, alone in ((0, PROMPTS[0]), (2, PROMPTS[1])):
        assert [response.token for response in answers[index]] == runtime.generate(alone, 20).tokens.tolist()
    monkeypatch.setattr(Batch, "stream", lambda *_: pytest.fail("begun"))
    with pytest.raises(error, match=message):
        runtime.generate_batch([PROMPTS[0], prompt], 20, size=2)


def test_an_answer_that_fails_ends_alone(tiny_runtime: LoadRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its logits are no numbers, say: the others get what they get alone."""
    runtime, sound = tiny_runtime(), Sampler.__call__
    batch, length = runtime.batch(3), len(PROMPTS[2]) + 3

    def failing(sampler: Sampler, logits: np.ndarray, context: list[int]) -> int:
        return sound(sampler, logits * np.nan if len(context) == length else logits, context)

    monkeypatch.setattr(Sampler, "__call__", failing)
    answers: dict[int, list[Response]] = {}
    for index, response in batch.stream([PROMPTS[2], PROMPTS[1], PROMPTS[3]], 12):
        answers.setdefault(index, []).append(response)
    assert [len(answers[index]) for index in range(3)] == [4, 12, 12]
    assert isinstance(answers[0][-1].error, BackendError)
    assert answers[0][-1].statistics.tokens == 3
    with pytest.raises(BackendError, match="not numbers"):
        runtime.generate_batch([PROMPTS[1], PROMPTS[2]], 12, size=2)
    monkeypatch.undo()
    for index, prompt in ((1, PROMPTS[1]), (2, PROMPTS[3])):
        assert [response.token for response in answers[index]] == runtime.generate(prompt, 12).tokens.tolist()


def test_a_generator_with_nothing_to_give_is_not_asked_all_the_time(tiny_runtime: LoadRuntime) -> None:
    asked = 0

    def arriving() -> Any:
        nonlocal asked
        until = time.monotonic() + 0.1
        while time.monotonic() < until:
            asked += 1
            yield None

    assert list(tiny_runtime().batch(2).stream(arriving(), 5)) == []
    assert asked <= 101


def test_what_cannot_be_batched(tiny_runtime: LoadRuntime) -> None:
    runtime = tiny_runtime()
    with pytest.raises(PolicyError, match="not whole units"):
        runtime.batch(2, skip=[0])
    with pytest.raises(BackendError, match="take one sequence at a time"):
        tiny_runtime("portable").batch(2)
    assert runtime.generate_batch([], 4) == []


class TestMistakes:
    """What would go wrong unseen if rows were not told apart."""

    @staticmethod
    def tokens(runtime: DashRuntime) -> list[list[int]]:
        setting = setting_of(runtime, "token")
        return [each.tokens.tolist() for each in runtime.generate_batch(PROMPTS, 30, size=3, **setting)]

    def test_all_take_the_first_one_s_position(
        self, tiny_runtime: LoadRuntime, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        expected, sound = self.tokens(tiny_runtime()), BoundStep.place

        def place(step: BoundStep) -> None:
            sound(step)
            step._seqlens_k[:] = step._seqlens_k[0]

        monkeypatch.setattr(BoundStep, "place", place)
        assert self.tokens(tiny_runtime()) != expected

    def test_a_row_that_moves_leaves_its_cache(
        self, tiny_runtime: LoadRuntime, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        runtime = tiny_runtime()
        plain = [runtime.generate(prompt, 30).tokens for prompt in PROMPTS]
        ends = frozenset(int(tokens[3 + 4 * i]) for i, tokens in enumerate(plain))
        monkeypatch.setattr(runtime.text, "eos_ids", ends)
        expected, sound = [each.tokens.tolist() for each in runtime.generate_batch(PROMPTS, 30, size=3)], KVCache.take

        def take(cache: KVCache, index: int, source: KVCache, other: int = 0) -> None:
            if source is not cache:
                sound(cache, index, source, other)

        monkeypatch.setattr(KVCache, "take", take)
        assert [each.tokens.tolist() for each in runtime.generate_batch(PROMPTS, 30, size=3)] != expected


@pytest.mark.model
def test_a_real_model_as_alone(smollm2_runtime: LoadRuntime) -> None:
    runtime = smollm2_runtime("cpu-fp32")
    asked = prompts(runtime)[:5]
    for setting in ({}, {"skipped": 4}):
        together = runtime.generate_batch(asked, 24, size=4, **setting)
        for prompt, generation in zip(asked, together, strict=True):
            alone = runtime.generate(prompt, 24, **setting)
            np.testing.assert_array_equal(generation.tokens, alone.tokens)
            np.testing.assert_array_equal(generation.actions, alone.actions)


@pytest.mark.model
def test_quantised_rows_are_near_one_alone(smollm2_runtime: LoadRuntime) -> None:
    """With int8 activations ONNX Runtime's kernels for one row, for two and for what is left over round differently:
    0.005 nats seen, of the 0.065 that int4 costs.
    """
    runtime = smollm2_runtime("cpu")
    ids = np.concatenate([prompts(runtime)[1], runtime.text.encode(" and then she told him what had happened")])
    batch, live = runtime.batch(3), runtime.session()
    batch._cache.reserve(len(ids))
    logits = batch.prompts.restart(ids[:20])
    for slot in range(3):
        batch.prompts.copy_cache(batch._cache, slot)
    np.testing.assert_array_equal(logits, live.prefill(ids[:20]))
    step = runtime.engines.step(batch._cache, 1, batch=3)  # type: ignore[call-arg]
    divergences = []
    for token in ids[20:]:
        step.decode_batch([int(token)] * 3, [DENSE] * 3)
        alone, _ = live.decode_one(int(token))
        divergences += [divergence(alone, row) for row in step.logits[:, 0]]
    assert np.mean(divergences) < 0.02


def divergence(logits: np.ndarray, other: np.ndarray) -> float:
    """KL, nats."""
    log_p, log_q = (each - np.logaddexp.reduce(each) for each in (logits.astype(float), other.astype(float)))
    return float((np.exp(log_p) * (log_p - log_q)).sum())
