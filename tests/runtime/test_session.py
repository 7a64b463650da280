"""Conversations: continuing, cancelling, limits, and sessions that share engines."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from dash_export import DashRuntime
from dash_export.errors import ContextLengthError, RequestError
from dash_export.runtime import Sampling, Session
from tests.tiny import random_ids

LoadRuntime = Callable[..., DashRuntime]
MESSAGES = [{"role": "user", "content": "Hi there, what is up?"}]


@pytest.fixture
def runtime(tiny_runtime: LoadRuntime) -> DashRuntime:
    return tiny_runtime()


@pytest.mark.parametrize("where", ["decode", "token"])
def test_an_interrupt_in_a_step_leaves_a_session_that_goes_on(
    where: str, tiny_runtime: Callable[..., DashRuntime], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C that an application catches: the next answer is what it would be without the interrupted step."""
    session, expected = tiny_runtime().session(), tiny_runtime().session()
    stream = session.stream([1, 2, 3, 4], 6)
    taken = [next(stream).token, next(stream).token]

    class Interrupting(list[int]):
        def append(self, token: int) -> None:
            super().append(token)
            raise KeyboardInterrupt

    step = session._bound(1)
    sound = step.decode

    def decode(*given: Any) -> None:
        sound(*given)
        raise KeyboardInterrupt

    if where == "decode":
        monkeypatch.setattr(step, "decode", decode)
    else:
        session.tokens = Interrupting(session.tokens)
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    monkeypatch.undo()
    session.tokens = list(session.tokens)
    again = session.generate([7, 8], 4)
    expected.prefill([1, 2, 3, 4, *taken])
    assert again.tokens.tolist() == expected.generate([7, 8], 4).tokens.tolist()


def test_a_second_prompt_continues_the_conversation(runtime: DashRuntime) -> None:
    first, second = random_ids(12, seed=1), random_ids(9, seed=2)
    live = runtime.session()
    made = live.generate(first, 10).tokens
    again = live.generate(second, 10).tokens
    whole = np.concatenate([first, made, second])
    np.testing.assert_array_equal(again, runtime.session().generate(whole, 10).tokens)
    assert live.tokens == [*whole, *again[:-1]]


def test_an_abandoned_stream_loses_no_token(runtime: DashRuntime) -> None:
    first, second = random_ids(12, seed=1), random_ids(9, seed=2)
    live, seen = runtime.session(), []
    for response in live.stream(first, 20):
        seen.append(response.token)
        if len(seen) == 4:
            break
    whole = np.concatenate([first, seen, second])
    np.testing.assert_array_equal(live.generate(second, 5).tokens, runtime.generate(whole, 5).tokens)


@pytest.mark.parametrize("other", ["stream", "chat", "reset", "prefill", "decode_one"])
def test_an_answer_left_for_another_is_over(other: str, runtime: DashRuntime) -> None:
    """Not mixed with it in silence."""
    live = runtime.session()
    first = live.stream(random_ids(12, seed=1), 20)
    next(first)
    others: dict[str, Callable[[], Any]] = {
        "stream": lambda: live.stream(random_ids(9, seed=2), 5),
        "chat": lambda: live.chat(MESSAGES, 5),
        "reset": live.reset,
        "prefill": lambda: live.prefill(random_ids(9, seed=2)),
        "decode_one": lambda: live.decode_one(7),
    }
    second = others[other]()
    with pytest.raises(RequestError, match="left for another"):
        next(first)
    if other in ("stream", "chat"):
        assert len(list(second)) == 5
    unbegun = live.stream(random_ids(3, seed=3), 5)
    list(live.stream(random_ids(3, seed=4), 5))
    with pytest.raises(RequestError, match="left for another"):
        list(unbegun)


def test_chat_reuses_what_the_cache_holds(runtime: DashRuntime) -> None:
    live = runtime.session()
    answer = "".join(response.text for response in live.chat(MESSAGES, 8))
    prefilled = live.counters.prefill_tokens
    follow_up = [*MESSAGES, {"role": "assistant", "content": answer}, {"role": "user", "content": "More."}]
    again = [response.token for response in live.chat(follow_up, 8)]
    ids = runtime.text.chat(follow_up)
    assert live.counters.prefill_tokens - prefilled < len(ids) - len(runtime.text.chat(MESSAGES)) + 9
    assert again == [response.token for response in runtime.chat(follow_up, 8)]
    # The same conversation once more: one token is computed for its logits.
    before = live.counters.prefill_tokens
    assert [response.token for response in live.chat(follow_up, 8)] == again
    assert live.counters.prefill_tokens == before + 1


def test_chat_with_another_beginning(runtime: DashRuntime) -> None:
    live = runtime.session()
    list(live.chat(MESSAGES, 8))
    other = [{"role": "user", "content": "Something else"}]
    assert [r.token for r in live.chat(other, 8)] == [r.token for r in runtime.chat(other, 8)]


def test_chat_whose_template_says_nothing(runtime: DashRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    live = runtime.session()
    live.generate(random_ids(6), 3)
    monkeypatch.setattr(runtime.text, "chat", lambda *_: [])
    with pytest.raises(RequestError, match="empty"):
        live.chat(MESSAGES)
    assert live.context_left == 512
    monkeypatch.undo()
    assert [r.token for r in live.chat(MESSAGES, 5)] == [r.token for r in runtime.chat(MESSAGES, 5)]


def test_a_fork_continues_from_there(runtime: DashRuntime) -> None:
    """One system prompt, many conversations; neither sees the other."""
    beginning, first, second = random_ids(30, seed=3), random_ids(9, seed=1), random_ids(9, seed=2)
    live = runtime.session(trade_off=runtime.build.dial[5].trade_off)
    live.prefill(beginning)
    twins = [live.fork(), live.fork()]
    found = [twin.generate(ids, 12).tokens for twin, ids in zip(twins, (first, second), strict=True)]
    assert [twin.counters.prefill_tokens for twin in twins] == [9, 9]
    for ids, tokens in zip((first, second), found, strict=True):
        other = runtime.session(trade_off=runtime.build.dial[5].trade_off)
        np.testing.assert_array_equal(tokens, other.generate(np.concatenate([beginning, ids]), 12).tokens)
    np.testing.assert_array_equal(live.generate(first, 12).tokens, found[0])


@pytest.mark.parametrize("how", ["prefill", "decode_one"])
def test_a_token_given_out_comes_before_what_follows(how: str, runtime: DashRuntime) -> None:
    """The last token of an answer is not in the cache yet, whatever continues the conversation."""
    first, more = random_ids(12, seed=1), random_ids(6, seed=2)
    live = runtime.session()
    made = live.generate(first, 5).tokens
    if how == "prefill":
        logits = live.prefill(more)
    else:
        for token in more:
            logits, _ = live.decode_one(int(token))
    whole = np.concatenate([first, made, more])
    assert live.tokens == whole.tolist()
    np.testing.assert_allclose(logits, runtime.session().prefill(whole), atol=1e-4)


def test_restart_keeps_what_it_cannot_replace(runtime: DashRuntime) -> None:
    live = runtime.session()
    live.restart(random_ids(12))
    with pytest.raises(RequestError, match="one list"):
        live.restart(np.zeros((2, 3), np.int64))
    with pytest.raises(RequestError, match="from 0 to 299"):
        live.restart([1, 300])
    assert len(live.tokens) == 12
    expected = runtime.session().prefill(random_ids(12))
    np.testing.assert_allclose(live.restart(random_ids(12)), expected, atol=1e-5)
    assert live.counters.prefill_tokens == 13


def test_reset(runtime: DashRuntime) -> None:
    live = runtime.session()
    live.generate(random_ids(20, seed=4), 10)
    live.reset()
    assert live.tokens == []
    assert live.context_left == 512
    np.testing.assert_array_equal(live.generate(random_ids(7), 9).tokens, runtime.generate(random_ids(7), 9).tokens)


def test_cancel(runtime: DashRuntime) -> None:
    live, responses = runtime.session(), []
    for response in live.stream(random_ids(5), 100):
        responses.append(response)
        if len(responses) == 3:
            live.cancel()
    assert len(responses) == 4
    assert responses[-1].finish_reason == "cancelled"
    assert live.generate(random_ids(5), 4).finish_reason == "length"


def test_max_tokens_and_statistics(runtime: DashRuntime) -> None:
    generation = runtime.generate(random_ids(11), 6)
    assert (generation.finish_reason, len(generation.tokens)) == ("length", 6)
    assert generation.actions.shape == (6, 6)
    figures = generation.statistics
    assert (figures.prompt_tokens, figures.tokens, figures.decode_steps) == (11, 6, 5)
    assert figures.layers_per_token == 6
    assert figures.tokens_per_second > 0


def test_end_of_turn(runtime: DashRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = runtime.generate(random_ids(8), 12).tokens
    monkeypatch.setattr(runtime.text, "eos_ids", frozenset({int(tokens[4])}))
    generation = runtime.generate(random_ids(8), 12)
    assert generation.finish_reason == "stop"
    stop = tokens.tolist().index(tokens[4])
    np.testing.assert_array_equal(generation.tokens, tokens[: stop + 1])


def test_stop_string(runtime: DashRuntime) -> None:
    plain = runtime.generate(random_ids(8), 40)
    stop = plain.text[4:7]
    generation = runtime.generate(random_ids(8), 40, Sampling(stop=(stop,)))
    assert generation.finish_reason == "stop"
    assert generation.text == plain.text.partition(stop)[0]
    assert len(generation.tokens) < 40


def test_context_limit_is_met_before_it_overflows(runtime: DashRuntime) -> None:
    live = runtime.session()
    with pytest.raises(ContextLengthError, match=r"600 prompt tokens and 1 new ones, but 512"):
        live.generate(random_ids(600), 1)
    with pytest.raises(ContextLengthError, match="512 positions"):
        live.generate(random_ids(500), 13)
    with pytest.raises(ContextLengthError):
        live.score(random_ids(513))
    assert live.tokens == []
    generation = live.generate(random_ids(500), 12)
    assert len(generation.tokens) == 12
    with pytest.raises(ContextLengthError):
        live.generate(random_ids(1), 1)


def test_the_last_position_is_usable(runtime: DashRuntime) -> None:
    ids = random_ids(512)
    live = runtime.session()
    live.prefill(ids[:511])
    logits, _ = live.decode_one(int(ids[511]))
    np.testing.assert_allclose(logits, runtime.session().logits(ids)[-1], atol=1e-4)
    with pytest.raises(ContextLengthError):
        live.decode_one(1)


BAD_PROMPTS: dict[str, tuple[Any, str]] = {
    "empty-text": ("", "empty"),
    "half-a-character": ("caf\udce9", "not valid Unicode"),
    "empty-list": ([], "empty"),
    "too-large": ([1, 300], "from 0 to 299"),
    "negative": ([-1], "from 0 to 299"),
    "floats": ([1.5], "integers"),
    "nested": ([[1, 2]], "one list"),
    "words": (["a"], "integers"),
}


@pytest.mark.parametrize("name", BAD_PROMPTS)
def test_bad_prompt(name: str, runtime: DashRuntime) -> None:
    prompt, message = BAD_PROMPTS[name]
    live = runtime.session()
    for ask in (live.generate, live.score, live.prefill):
        with pytest.raises(RequestError, match=message):
            ask(prompt)


def tokens_of(session: Session, seed: int) -> list[int]:
    return session.generate(random_ids(10, seed=seed), 40).tokens.tolist()


def test_interleaved_sessions_do_not_mix(runtime: DashRuntime) -> None:
    trade_off = runtime.build.dial[5].trade_off
    kinds: list[dict[str, Any]] = [{}, {"trade_off": trade_off}, {"skip": (2, 3)}]
    alone = [tokens_of(runtime.session(**kind), seed) for seed, kind in enumerate(kinds)]
    streams = [runtime.session(**kind).stream(random_ids(10, seed=seed), 40) for seed, kind in enumerate(kinds)]
    together: list[list[int]] = [[] for _ in kinds]
    for responses in zip(*streams, strict=True):
        for tokens, response in zip(together, responses, strict=True):
            tokens.append(response.token)
    assert together == alone


def test_one_session_per_thread(runtime: DashRuntime) -> None:
    trade_off = runtime.build.dial[5].trade_off
    alone = [tokens_of(runtime.session(trade_off=trade_off), seed) for seed in range(2)]
    found: dict[int, list[list[int]]] = {0: [], 1: []}

    def work(seed: int) -> None:
        for _ in range(5):
            found[seed].append(tokens_of(runtime.session(trade_off=trade_off), seed))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, results in found.items():
        assert results == [alone[seed]] * 5


def test_sampling_reaches_the_tokens(runtime: DashRuntime) -> None:
    one, same, other = (runtime.generate([1, 2], 30, Sampling(1.0, seed=seed)).tokens.tolist() for seed in (1, 1, 2))
    assert one == same
    assert one != other
    assert (
        runtime.generate([1, 2], 30, Sampling(1.0, top_k=1, seed=0)).tokens.tolist()
        == runtime.generate([1, 2], 30).tokens.tolist()
    )


def test_cache_is_sized_to_the_request(runtime: DashRuntime) -> None:
    live = runtime.session()
    assert live.cache_bytes == 0
    live.generate(random_ids(10), 20)
    assert live.cache_bytes == 2 * 6 * 2 * 256 * 16 * 4
    live.generate(random_ids(300), 20)
    assert live.cache_bytes == 2 * 6 * 2 * 512 * 16 * 4
    assert live.counters.cache_growths == 2


def test_a_score_does_not_depend_on_what_was_before(runtime: DashRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text that begins a context has the tokens that begin one (a BOS, for some models)."""
    plain = runtime.text.encode
    monkeypatch.setattr(
        runtime.text, "encode", lambda text, special=True, **_: [7] * special + plain(text, special=False)
    )
    live = runtime.session()
    scores = [live.score("One day").log_likelihoods for _ in range(2)]
    np.testing.assert_array_equal(*scores)
    np.testing.assert_array_equal(*(live.logits("One day") for _ in range(2)))
    assert len(live.logits("One day")) == 1 + len(plain("One day", special=False))


def test_a_cache_that_cannot_grow_stays_as_it_was(runtime: DashRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    live = runtime.session()
    live.prefill(random_ids(20))
    cache = live._cache
    capacity = cache.capacity

    def full(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(np, "zeros", full)
        with pytest.raises(MemoryError):
            cache.reserve(capacity + 1)
    assert cache.capacity == capacity
    assert cache.reserve(capacity + 1)
    assert cache.keys.shape[3] == cache.capacity > capacity


def test_what_an_interrupted_pass_leaves_is_known(runtime: DashRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    """`tokens` are what the cache holds, so that the next prompt continues from there and not from less."""
    ids = random_ids(70)
    live = runtime.session()
    monkeypatch.setattr(live, "_chunk", lambda: 32)
    bound, passes = live._bound, []

    def interrupted(*args: Any, **options: Any) -> Any:
        passes.append(1)
        if len(passes) == 3:
            raise KeyboardInterrupt
        return bound(*args, **options)

    monkeypatch.setattr(live, "_bound", interrupted)
    with pytest.raises(KeyboardInterrupt):
        live.prefill(ids)
    assert live.tokens == ids[:64].tolist()
    assert live._cache.length == 64
    again = live.prefill(ids[64:])
    np.testing.assert_allclose(again, runtime.session().prefill(ids), atol=1e-4)


def test_figures_of_nothing(tiny_runtime: Callable[..., DashRuntime]) -> None:
    session = tiny_runtime().session("dense")
    with pytest.raises(RequestError, match="One token has no perplexity"):
        _ = session.score([1]).perplexity
    with pytest.raises(RequestError, match="ask for one or more"):
        session.decode_step(-5)


def test_a_score_leaves_nothing_to_go_on_from(tiny_runtime: LoadRuntime) -> None:
    """Its K and V are those of skips, and a prompt is dense."""
    runtime, ids = tiny_runtime(), random_ids(20)
    static = {"policy": "static", "skip": [2, 3, 4]}
    used = runtime.session(**static)
    used.score(ids)
    assert used.tokens == []
    np.testing.assert_array_equal(used.restart(ids), runtime.session(**static).restart(ids))
