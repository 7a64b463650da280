"""Sequences decoded together get what they get alone, whoever else is there, comes or goes."""

from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from dash_export import DashRuntime
from dash_export.backends.host.cache import KVCache
from dash_export.core.divergence import DenseRows
from dash_export.core.rule import DENSE
from dash_export.core.sampling import Sampler
from dash_export.errors import BackendError, ContextLengthError, PolicyError, RequestError
from dash_export.runtime import Batch, Response, Sampling
from dash_export.runtime.results import NO_TOKEN, Turn
from tests.runtime.prompts import prompts
from tests.tiny import random_ids

LoadRuntime = Callable[..., DashRuntime]
SettingOf = Callable[[str], dict[str, Any]]
PROMPTS = [random_ids(length, seed=length) for length in (12, 1, 40, 7, 25, 2)]


def responses(batch: Batch, asked: Iterable[Any], max_tokens: int = 20) -> dict[int, list[Response]]:
    """By prompt."""
    found: dict[int, list[Response]] = {}
    for index, response in batch.stream(asked, max_tokens):
        found.setdefault(index, []).append(response)
    return found


def answers(batch: Batch, asked: Iterable[Any], max_tokens: int = 20) -> dict[int, list[int]]:
    """Tokens by prompt."""
    found = responses(batch, asked, max_tokens)
    return {index: [response.token for response in each] for index, each in found.items()}


def alone(runtime: DashRuntime, asked: Iterable[Any], max_tokens: int = 20, **setting: Any) -> dict[int, list[int]]:
    return {i: runtime.generate(ids, max_tokens, **setting).tokens.tolist() for i, ids in enumerate(asked)}


SAMPLING = Sampling(1.0, top_p=0.9, repetition_penalty=1.2, seed=3, stop=("e",))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *((kind, {"max_tokens": 30}) for kind in ("dense", "static", "token", "bounded", "held")),
        ("token", {"max_tokens": 1}),
        ("token", {"max_tokens": 25, "sampling": SAMPLING}),
    ],
)
def test_as_alone(kind: str, options: dict[str, Any], runtime: DashRuntime, setting_of: SettingOf) -> None:
    setting = setting_of(kind)
    together = runtime.generate_batch(PROMPTS, size=3, **options, **setting)
    for prompt, found in zip(PROMPTS, together, strict=True):
        expected = runtime.generate(prompt, **options, **setting)
        np.testing.assert_array_equal(found.tokens, expected.tokens)
        np.testing.assert_array_equal(found.actions, expected.actions)
        assert (found.text, found.finish_reason) == (expected.text, expected.finish_reason)
        assert found.statistics.prompt_tokens == len(prompt)
        assert found.statistics.tokens == len(found.tokens)
    skipped = [found.actions.sum(axis=0).tolist() for found in together]
    if kind == "token" and options["max_tokens"] == 30:
        assert any(one != other for one, other in pairwise(skipped)), "rows decide differently"


def test_they_end_at_different_times(runtime: DashRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    """An end of turn frees a place in the middle: the last row moves there, and the next prompt comes in. A step holds
    the logits of all its rows: the full one stays, of the others the last.
    """
    plain = [runtime.generate(prompt, 30).tokens for prompt in PROMPTS]
    monkeypatch.setattr(runtime.text, "eos_ids", frozenset(int(tokens[3 + 4 * i]) for i, tokens in enumerate(plain)))
    together = runtime.generate_batch(PROMPTS, 30, size=3)
    assert len({len(each.tokens) for each in together}) > 2
    assert [each.tokens.tolist() for each in together] == [*alone(runtime, PROMPTS, 30).values()]
    batch, seen = runtime.batch(5), set()
    for _ in batch.stream(PROMPTS, 30):
        seen |= set(batch.rows.steps._bound)
        assert len(batch.rows.steps._bound) <= 3
    assert len(seen) > 3


@pytest.mark.parametrize("continues", [True, False])
def test_whether_an_answer_goes_on_with_the_text_of_its_prompt(
    continues: bool, runtime: DashRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    turn = Mock(wraps=Turn)
    monkeypatch.setattr("dash_export.runtime.batch.Turn", turn)
    assert list(runtime.batch(2).stream([PROMPTS[0]], 2, continues=continues))
    assert turn.call_args.kwargs["after"] == (PROMPTS[0][-1] if continues else None)


def test_the_cache_grows_under_them(runtime: DashRuntime, setting_of: SettingOf) -> None:
    setting = setting_of("token")
    porch = runtime.session(**setting)
    porch.kv_step = 16
    batch = Batch(runtime.engines, porch, 3)  # type: ignore[arg-type]
    assert answers(batch, PROMPTS, 40) == alone(runtime, PROMPTS, 40, **setting)
    assert batch.rows.cache.capacity > 64


def test_a_common_beginning_is_computed_once(runtime: DashRuntime, setting_of: SettingOf) -> None:
    asked = [np.concatenate([random_ids(50, seed=9), random_ids(5, seed=seed)]) for seed in range(4)]
    setting = setting_of("token")
    batch = runtime.batch(4, **setting)
    assert answers(batch, asked, 10) == alone(runtime, asked, 10, **setting)
    assert batch.prompts.prefilled <= 55 + 3 * (5 + 2), "of 50 known ones 48 are whole tiles"


def test_prompts_are_taken_when_there_is_room(runtime: DashRuntime) -> None:
    """And a generator that has nothing now holds nobody up: this one waits for an answer before it gives the third."""
    taken, got = [], []

    def arriving() -> Any:
        for prompt in PROMPTS[:2]:
            taken.append(len(prompt))
            yield prompt
        while got.count(0) < 5:
            yield None
        yield PROMPTS[2]

    stream = runtime.batch(4).stream(arriving(), 8)
    assert taken == []
    found: dict[int, list[int]] = {}
    for index, response in stream:
        got.append(index)
        found.setdefault(index, []).append(response.token)
    assert got.index(2) >= 9
    assert found == alone(runtime, PROMPTS[:3], 8)


@pytest.mark.parametrize("begun", ["not at all", "before", "by its prompts"])
def test_one_stream_at_a_time(begun: str, runtime: DashRuntime) -> None:
    """A second one takes the rows over. The first says so and leaves the second alone."""
    batch = runtime.batch(2)
    made: list[Iterator[tuple[int, Response]]] = []

    def asked() -> Iterator[Any]:
        if begun == "by its prompts":
            begin()
        yield from PROMPTS[:2]

    def begin() -> None:
        made.append(batch.stream(PROMPTS[2:3], 8))
        tokens.append(next(made[0])[1].token)

    tokens: list[int] = []
    first = batch.stream(asked(), 20)
    if begun == "before":
        next(first), next(first)
    if begun != "by its prompts":
        begin()
    with pytest.raises(RequestError, match="Another stream of this batch"):
        next(first)
    tokens += [response.token for _, response in made[0]]
    assert tokens == alone(runtime, PROMPTS[2:3], 8)[0]


def test_a_batch_goes_on_after_an_abandoned_stream_and_an_error(runtime: DashRuntime, setting_of: SettingOf) -> None:
    setting = setting_of("token")
    batch = runtime.batch(3, **setting)
    abandoned = batch.stream(PROMPTS, 20)
    for _ in range(7):
        next(abandoned)
    abandoned.close()

    def failing() -> Any:
        yield PROMPTS[0]
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):  # the caller's own, as it is
        answers(batch, failing())
    assert answers(batch, PROMPTS) == alone(runtime, PROMPTS, **setting)
    assert batch.rows.cache.lengths == [0] * 3, "rows that nobody has are not copied when the cache grows"


def test_as_many_tokens_as_there_is_room(runtime: DashRuntime) -> None:
    """Each prompt has its own."""
    asked = [random_ids(440), random_ids(20), random_ids(511)]
    assert [len(each.tokens) for each in runtime.generate_batch(asked, None, size=3)] == [72, 256, 1]


def test_skipping_together_saves_what_all_skip(runtime: DashRuntime, setting_of: SettingOf) -> None:
    """A layer runs when any sequence runs it: counted in the batch's steps, not in what each sequence took."""
    batch = runtime.batch(3, **setting_of("token"))
    responses = list(batch.stream(PROMPTS[:3], 60))
    own = np.mean([6 - response.actions.sum() for _, response in responses[3:]])
    assert own < 5.5
    assert own < batch.rows.layers_run / batch.rows.decode_steps < 6
    same = runtime.batch(3, **setting_of("static"))
    answers(same, PROMPTS[2:5], 10)
    assert same.rows.layers_run == 4 * same.rows.decode_steps


BAD_PROMPTS: dict[str, tuple[Any, type[Exception], str]] = {
    "empty": ("", RequestError, "empty"),
    "unknown": ([300], RequestError, "from 0 to 299"),
    "no-prompt": (7, RequestError, "one list"),
    "long": (random_ids(500), ContextLengthError, "500 prompt tokens and 20 new ones"),
}


@pytest.mark.parametrize("name", BAD_PROMPTS)
def test_a_bad_prompt(name: str, runtime: DashRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a list of prompts all are looked at before any is begun; of a stream each when its turn comes, and those that
    cannot be answered end alone.
    """
    prompt, error, message = BAD_PROMPTS[name]
    found = responses(runtime.batch(2), [PROMPTS[0], prompt, PROMPTS[1]])
    (refused,) = found.pop(1)
    assert (refused.finish_reason, refused.token, type(refused.error)) == ("error", NO_TOKEN, error)
    assert [[response.token for response in each] for each in found.values()] == [*alone(runtime, PROMPTS[:2]).values()]
    monkeypatch.setattr(Batch, "stream", lambda *_: pytest.fail("begun"))
    with pytest.raises(error, match=message):
        runtime.generate_batch([PROMPTS[0], prompt], 20, size=2)


def test_a_prompt_without_memory_ends_alone(runtime: DashRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    sound = KVCache.reserve

    def reserve(cache: KVCache, rows: int) -> bool:
        if rows > 200:
            raise MemoryError
        return sound(cache, rows)

    monkeypatch.setattr(KVCache, "reserve", reserve)
    found = list(runtime.batch(3).stream([random_ids(5), random_ids(300), random_ids(7)], 4))
    ends = {index: response.finish_reason for index, response in found if response.finish_reason}
    assert ends == {0: "length", 1: "error", 2: "length"}


def test_an_answer_that_fails_ends_alone(runtime: DashRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its logits are no numbers, say: the others get what they get alone."""
    sound, length, expected = Sampler.__call__, len(PROMPTS[2]) + 3, alone(runtime, PROMPTS, 12)

    def failing(sampler: Sampler, logits: np.ndarray, context: list[int]) -> int:
        return sound(sampler, logits * np.nan if len(context) == length else logits, context)

    monkeypatch.setattr(Sampler, "__call__", failing)
    found = responses(runtime.batch(3), [PROMPTS[2], PROMPTS[1], PROMPTS[3]], 12)
    assert isinstance(found[0][-1].error, BackendError)
    assert found[0][-1].statistics.tokens == 3
    assert [[response.token for response in found[index]] for index in (1, 2)] == [expected[1], expected[3]]
    with pytest.raises(BackendError, match="not numbers"):
        runtime.generate_batch([PROMPTS[1], PROMPTS[2]], 12, size=2)


def test_what_cannot_be_batched(runtime: DashRuntime, tiny_runtime: LoadRuntime) -> None:
    with pytest.raises(PolicyError, match="not whole units"):
        runtime.batch(2, skip=[0])
    with pytest.raises(BackendError, match="decode 1 together, not 2: the target 'cpu' takes more"):
        tiny_runtime("portable").batch(2)
    assert runtime.generate_batch([], 4) == []


@pytest.mark.model
def test_a_real_model_as_alone(smollm2_runtime: LoadRuntime) -> None:
    runtime = smollm2_runtime("cpu-fp32")
    asked = prompts(runtime)[1:5]
    together = runtime.generate_batch(asked, 16, size=3, skipped=4)
    for prompt, generation in zip(asked, together, strict=True):
        expected = runtime.generate(prompt, 16, skipped=4)
        np.testing.assert_array_equal(generation.tokens, expected.tokens)
        np.testing.assert_array_equal(generation.actions, expected.actions)


@pytest.mark.model
def test_quantised_rows_are_near_one_alone(smollm2_runtime: LoadRuntime) -> None:
    """With int8 activations ONNX Runtime's kernels for one row, for two and for what is left over round differently:
    0.005 nats seen, of the 0.065 that int4 costs.
    """
    runtime = smollm2_runtime("cpu-nearest")
    ids = np.concatenate([prompts(runtime)[1], runtime.text.encode(" and then she told him what had happened")])
    batch, live = runtime.batch(3), runtime.session()
    batch.rows.cache.reserve(len(ids))
    logits = batch.prompts.restart(ids[:20])
    for slot in range(3):
        batch.rows.cache.take(slot, batch.prompts.cache)
    np.testing.assert_array_equal(logits, live.prefill(ids[:20]))
    step = batch.engines.step(batch.rows.cache, 1, batch=3)
    divergences = []
    for token in ids[20:].tolist():
        step.decode_batch([token] * 3, [DENSE] * 3)
        one, _ = live.decode_one(token)
        divergences.append(DenseRows(one[None].repeat(3, axis=0)).kl(step.logits[:, 0]))
    assert np.mean(divergences) < 0.02
