"""Conversations: continuing, cancelling, limits, and sessions that share engines."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dash_export import DashRuntime
from dash_export.backends.host.cache import TILE
from dash_export.errors import ContextLengthError, PolicyError, RequestError
from dash_export.runtime import Sampling, Session
from tests.tiny import random_ids

SettingOf = Callable[[str], dict[str, Any]]
MESSAGES = [{"role": "user", "content": "Hi there, what is up?"}]
FIRST, SECOND = random_ids(12, seed=1), random_ids(9, seed=2)


def tokens_of(runtime: DashRuntime, *parts: Any, count: int = 10, **setting: Any) -> list[int]:
    """What a new session answers to all parts as one prompt."""
    return runtime.generate(np.concatenate(parts), count, **setting).tokens.tolist()


@pytest.mark.parametrize("how", ["generate", "prefill", "decode_one"])
def test_a_second_prompt_continues_the_conversation(how: str, runtime: DashRuntime) -> None:
    """The last token of an answer is not in the cache yet: it comes before what follows, whatever that is."""
    live = runtime.session()
    made = live.generate(FIRST, 10).tokens
    if how == "generate":
        assert live.generate(SECOND, 10).tokens.tolist() == tokens_of(runtime, FIRST, made, SECOND)
        return
    if how == "prefill":
        logits = live.prefill(SECOND)
    else:
        for token in SECOND.tolist():
            logits, _ = live.decode_one(token)
    whole = np.concatenate([FIRST, made, SECOND])
    assert live.tokens == whole.tolist()
    np.testing.assert_allclose(logits, runtime.session().prefill(whole), atol=1e-4)


def test_an_abandoned_stream_loses_no_token(runtime: DashRuntime) -> None:
    live, seen = runtime.session(), []
    for response in live.stream(FIRST, 20):
        seen.append(response.token)
        if len(seen) == 4:
            break
    assert live.generate(SECOND, 10).tokens.tolist() == tokens_of(runtime, FIRST, seen, SECOND)


@pytest.mark.parametrize("other", ["stream", "chat", "reset", "prefill", "decode_one"])
def test_an_answer_left_for_another_is_over(other: str, runtime: DashRuntime) -> None:
    """Not mixed with it in silence."""
    live = runtime.session()
    unbegun = live.stream(FIRST, 5)
    first = live.stream(FIRST, 20)
    next(first)
    given = {"stream": (SECOND, 5), "chat": (MESSAGES, 5), "reset": (), "prefill": (SECOND,), "decode_one": (7,)}
    second = getattr(live, other)(*given[other])
    for left in (first, unbegun):
        with pytest.raises(RequestError, match="left for another"):
            next(left)
    if other in ("stream", "chat"):
        assert len(list(second)) == 5


def test_chat_reuses_what_the_cache_holds(runtime: DashRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    live = runtime.session()
    answer = "".join(response.text for response in live.chat(MESSAGES, 8))
    follow_up = [*MESSAGES, {"role": "assistant", "content": answer}, {"role": "user", "content": "More."}]
    expected = [response.token for response in runtime.chat(follow_up, 8)]
    prefilled = live.prefilled
    assert [response.token for response in live.chat(follow_up, 8)] == expected
    new = len(runtime.text.chat(follow_up)) - len(runtime.text.chat(MESSAGES))
    assert live.prefilled - prefilled < new + 9 + TILE
    # The same conversation once more: two tokens or a tile more are computed for the logits of the last.
    before = live.prefilled
    assert [response.token for response in live.chat(follow_up, 8)] == expected
    assert before + 2 <= live.prefilled < before + 2 + TILE
    other = [{"role": "user", "content": "Something else"}]
    assert [r.token for r in live.chat(other, 8)] == [r.token for r in runtime.chat(other, 8)]
    monkeypatch.setattr(runtime.text, "chat", lambda *_: [])
    with pytest.raises(RequestError, match="empty"):  # a template that says nothing
        live.chat(MESSAGES)


def test_a_fork_continues_from_there(runtime: DashRuntime, setting_of: SettingOf) -> None:
    """One system prompt, many conversations; neither sees the other."""
    beginning, setting = random_ids(30, seed=3), setting_of("token")
    live = runtime.session(**setting)
    live.prefill(beginning)
    twins = [live.fork(), live.fork()]
    for twin, ids in zip((*twins, live), (FIRST, SECOND, FIRST), strict=True):
        assert twin.generate(ids, 12).tokens.tolist() == tokens_of(runtime, beginning, ids, count=12, **setting)
    assert [twin.prefilled for twin in twins] == [12, 9]


class Counts:
    """A policy that skips nothing, and begins so many conversations."""

    def __init__(self, most: int = 99) -> None:
        self.begun, self.most = 0, most

    def begin(self, *_: object) -> None:
        self.begun += 1
        if self.begun > self.most:
            raise ValueError("no more")

    def skips(self, state: Any) -> np.ndarray:
        return np.zeros((2, len(state.tokens)), np.bool_)


def test_another_conversation_begins_anew(runtime: DashRuntime) -> None:
    """Also where it has its beginning in common with the last one; one that goes on does not begin."""
    policy = Counts()
    live = runtime.session_under(policy)
    for number in range(3):
        begun = policy.begun
        list(live.chat([{"role": "user", "content": "x" * 30 + str(number)}], 40))
        assert policy.begun == begun + 1
        assert len(live.tokens) > 60
    live.fork().rewind_to([*live.tokens[:-2], 5, 6, 7])
    live.rewind_to([*live.tokens[:-2], 5, 6, 7])
    assert policy.begun == begun + 1


def test_a_reset_that_breaks_off(runtime: DashRuntime) -> None:
    """Whatever is left, a fork is what its parent is."""
    live = runtime.session_under(Counts(1))
    live.prefill(FIRST)
    with pytest.raises(PolicyError, match="no more"):
        live.reset()
    expected = runtime.session().prefill([*live.tokens, 7])
    np.testing.assert_allclose(live.fork().prefill([7]), expected, atol=1e-5)
    live.cache.length = 0  # as an interrupt within a step may leave it
    np.testing.assert_allclose(live.fork().prefill([7]), expected, atol=1e-5)


def test_a_runtime_stays_where_it_was_loaded(tiny_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines for several rows are loaded when they are first needed."""
    monkeypatch.chdir(tiny_root.parent)
    here = DashRuntime.load(tiny_root.name, "cpu-fp32")
    monkeypatch.chdir(tmp_path)
    assert len(here.generate_batch([FIRST, SECOND], 3)) == 2


def test_a_fork_keeps_its_state(runtime: DashRuntime) -> None:
    """The parent goes on in memory of its own."""
    live = runtime.session()
    live.generate(FIRST, 4)
    twin = live.fork()
    hidden = live.hidden
    live.generate(SECOND, 4)
    np.testing.assert_array_equal(twin.hidden, hidden)
    assert (live.hidden != hidden).any()


def test_restart_keeps_what_it_cannot_replace(runtime: DashRuntime) -> None:
    live = runtime.session()
    live.restart(FIRST)
    with pytest.raises(RequestError, match="one list"):
        live.restart(np.zeros((2, 3), np.int64))
    assert len(live.tokens) == 12
    np.testing.assert_allclose(live.restart(FIRST), runtime.session().prefill(FIRST), atol=1e-5)
    assert live.prefilled == 24, "no whole tile is known"
    live.reset()
    assert (live.tokens, live.context_left) == ([], 512)
    assert live.generate(SECOND, 10).tokens.tolist() == tokens_of(runtime, SECOND)


def test_cancel(runtime: DashRuntime) -> None:
    live, responses = runtime.session(), []
    for response in live.stream(random_ids(5), 100):
        responses.append(response)
        if len(responses) == 3:
            live.cancel()
    assert len(responses) == 4
    assert responses[-1].finish_reason == "cancelled"
    assert live.generate(random_ids(5), 4).finish_reason == "length"


def test_cancel_while_a_chat_is_rendered(runtime: DashRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    live, render = runtime.session(), runtime.text.chat
    monkeypatch.setattr(runtime.text, "chat", lambda *given: (live.cancel(), render(*given))[1])
    assert [response.finish_reason for response in live.chat(MESSAGES, 8)] == ["cancelled"]


def test_where_an_answer_ends(runtime: DashRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    """At its length, at a stop string, at an end of turn; and its figures."""
    plain = runtime.generate(random_ids(8), 40)
    assert (plain.finish_reason, plain.actions.shape) == ("length", (40, 6))
    figures = plain.statistics
    assert (figures.prompt_tokens, figures.tokens, figures.decode_steps) == (8, 40, 39)
    assert figures.layers_per_token == 6
    assert min(figures.tokens_per_second, figures.prefill_seconds) > 0
    stop = plain.text[4:7]
    stopped = runtime.generate(random_ids(8), 40, Sampling(stop=(stop,)))
    assert (stopped.finish_reason, stopped.text) == ("stop", plain.text.partition(stop)[0])
    end = int(plain.tokens[4])
    monkeypatch.setattr(runtime.text, "eos_ids", frozenset({end}))
    ended = runtime.generate(random_ids(8), 40)
    assert ended.finish_reason == "stop"
    assert ended.tokens.tolist() == plain.tokens.tolist()[: plain.tokens.tolist().index(end) + 1]
    assert ended.text == runtime.generate(random_ids(8), len(ended.tokens) - 1).text, "the end is no text"


def test_sampling_reaches_the_tokens(runtime: DashRuntime) -> None:
    one, same, other = (runtime.generate([1, 2], 30, Sampling(1.0, seed=seed)).tokens.tolist() for seed in (1, 1, 2))
    assert one == same != other
    assert runtime.generate([1, 2], 30, Sampling(1.0, top_k=1)).tokens.tolist() == tokens_of(runtime, [1, 2], count=30)


def test_the_whole_context_is_usable_and_no_more(runtime: DashRuntime) -> None:
    ids, live = random_ids(512), runtime.session()
    for ask, message in (
        (lambda: live.generate(random_ids(600), 1), r"600 prompt tokens and 1 new ones, but 512"),
        (lambda: live.generate(random_ids(500), 13), "512 positions"),
        (lambda: live.score(random_ids(513)), "513 prompt tokens"),
    ):
        with pytest.raises(ContextLengthError, match=message):
            ask()
    assert live.tokens == []
    assert len(live.generate(random_ids(500), None).tokens) == 12
    live.reset()
    live.prefill(ids[:511])
    logits, _ = live.decode_one(int(ids[511]))
    np.testing.assert_allclose(logits, runtime.session().logits(ids)[-1], atol=1e-4)
    for ask in (lambda: live.decode_one(1), lambda: live.generate([1], 1)):
        with pytest.raises(ContextLengthError):
            ask()


BAD_PROMPTS: dict[str, tuple[Any, str]] = {
    "empty-text": ("", "empty"),
    "half-a-character": ("caf\udce9", "not valid Unicode"),
    "empty-list": ([], "empty"),
    "too-large": ([1, 300], "from 0 to 299"),
    "negative": ([-1], "from 0 to 299"),
    "floats": ([1.5], "integers"),
    "nested": ([[1, 2]], "one list"),
}


@pytest.mark.parametrize("name", BAD_PROMPTS)
def test_bad_prompt(name: str, runtime: DashRuntime) -> None:
    prompt, message = BAD_PROMPTS[name]
    live = runtime.session()
    for ask in (live.generate, live.score, live.prefill):
        with pytest.raises(RequestError, match=message):
            ask(prompt)


@pytest.mark.parametrize("how", ["in turns", "in threads"])
def test_sessions_do_not_mix(how: str, runtime: DashRuntime, setting_of: SettingOf) -> None:
    settings = [setting_of(kind) for kind in ("dense", "token", "static", "token")]
    expected = [tokens_of(runtime, random_ids(10, seed=i), count=40, **each) for i, each in enumerate(settings)]

    def answer(place: int) -> list[int]:
        return tokens_of(runtime, random_ids(10, seed=place), count=40, **settings[place])

    if how == "in threads":
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(answer, [0, 1, 2, 3] * 3)) == expected * 3
        return
    streams = [runtime.session(**each).stream(random_ids(10, seed=i), 40) for i, each in enumerate(settings)]
    together = [[response.token for response in responses] for responses in zip(*streams, strict=True)]
    assert [list(each) for each in zip(*together, strict=True)] == expected


def test_cache_is_sized_to_the_request(runtime: DashRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    """And stays as it was where it cannot grow."""
    live = runtime.session()
    assert live.cache.nbytes == 0
    live.generate(random_ids(10), 20)
    assert live.cache.nbytes == 2 * 6 * 2 * 256 * 16 * 4

    def full(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(np, "zeros", full)
        with pytest.raises(MemoryError):
            live.cache.reserve(257)
    assert live.cache.capacity == 256
    live.generate(random_ids(300), 20)
    assert live.cache.nbytes == 2 * 6 * 2 * 512 * 16 * 4


def test_a_score_is_of_a_text_that_begins_a_context(runtime: DashRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the tokens that begin one (a BOS, for some models), whatever was before, and leaves nothing to go on from:
    its K and V are those of skips, and a prompt is dense.
    """
    plain = runtime.text.encode
    monkeypatch.setattr(
        runtime.text, "encode", lambda text, special=True, **_: [7] * special + plain(text, special=False)
    )
    static = {"policy": "static", "skip": [2, 3, 4]}
    live: Session = runtime.session(**static)
    scores = [live.score("One day").log_likelihoods for _ in range(2)]
    np.testing.assert_array_equal(*scores)
    assert len(live.logits("One day")) == 1 + len(plain("One day", special=False))
    live.score(FIRST)
    assert live.tokens == []
    np.testing.assert_array_equal(live.restart(FIRST), runtime.session(**static).restart(FIRST))
    with pytest.raises(RequestError, match="One token has no perplexity"):
        _ = live.score([1]).perplexity
