"""Drafts change how many tokens a pass gives, never which: whatever is accepted, refused, or cut off in its middle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from dash_export import DashRuntime
from dash_export.core.drafts import Ask, Drafts
from dash_export.core.passes import PassCosts
from dash_export.errors import PolicyError
from dash_export.runtime import Response, Sampling, Session
from dash_export.text.guidance import json_grammar
from tests.tiny import random_ids

COSTS = PassCosts((1, 2, 8, 16), (256,), ((1.0, 1.05, 1.3, 2.0),))
FIRST, SECOND = random_ids(12, seed=1), random_ids(9, seed=2)
GIVEN = 40


class Scripted(Drafts):
    """Drafts of a known text, all of them right up to every `wrong`th."""

    def __init__(self, text: Sequence[int], wrong: int, count: int = 5) -> None:
        super().__init__(COSTS)
        self.text, self.wrong, self.count, self.told = [*text], wrong, count, list[tuple[int, int]]()

    def several(self, context: int) -> bool:  # noqa: ARG002
        return True

    def guesses(self, ask: Ask | None, context: int, most: int) -> list[int]:  # noqa: ARG002
        ahead = range(self.known, self.known + min(self.count, most))
        ids = [self.text[place] if place < len(self.text) else 0 for place in ahead]
        off = [(place + 1) % self.wrong == 0 for place in range(len(ids))]
        return [(token + 1) % 300 if bad else token for token, bad in zip(ids, off, strict=True)]

    def judge(self, accepted: int, drafts: int) -> None:
        self.told.append((accepted, drafts))


def drafting(runtime: DashRuntime, text: Sequence[int], wrong: int, count: int = 5) -> Session:
    return replace(runtime.session(), new_drafts=lambda: Scripted(text, wrong, count))


def tokens(responses: Sequence[Response]) -> list[int]:
    return [response.token for response in responses]


WRONG, NEVER = 1, 99
SAMPLINGS = {
    "greedy": Sampling(),
    "seed": Sampling(1.0, seed=5),
    "penalties": Sampling(0.8, top_p=0.9, repetition_penalty=1.3, frequency_penalty=0.4, seed=7),
    "bias": Sampling(logit_bias={9: 3.0, 17: -5.0}, presence_penalty=0.5),
}


@pytest.mark.parametrize("name", SAMPLINGS)
def test_the_same_text_whatever_is_accepted(name: str, runtime: DashRuntime) -> None:
    """Refused rows are not in the cache, and the sampler never saw them: a second turn goes on the same, too."""
    sampling = SAMPLINGS[name]
    plain = runtime.session(draft="off")
    expected = [*plain.stream(FIRST, GIVEN, sampling)]
    text = [*FIRST, *tokens(expected)]
    for wrong in (WRONG, 2, 3, NEVER):
        live = drafting(runtime, text, wrong)
        found = [*live.stream(FIRST, GIVEN, sampling)]
        assert tokens(found) == tokens(expected)
        said = found[-1].statistics
        share = {WRONG: 0, NEVER: 1}.get(wrong, said.accepted / said.drafts)
        assert said.accepted / said.drafts == pytest.approx(share, abs=0.1)
        assert sum(response.drafted for response in found) == said.accepted
        assert said.passes + said.accepted - said.decode_steps in (0, 1), "the last row's draft is spare"
        assert live.tokens == text[:-1]
        assert live.cache.length == len(live.tokens)
        np.testing.assert_allclose(live.prefill(SECOND), runtime.session().prefill([*text, *SECOND]), atol=1e-4)


def test_bit_for_bit(runtime: DashRuntime) -> None:
    """The logits of a token are the same in a pass that accepts and in one that refuses."""
    text = [*FIRST, *runtime.session().generate(FIRST, GIVEN).tokens]
    sampling = Sampling(logprobs=3)
    right, wrong = (
        [response.logprobs for response in drafting(runtime, text, each).stream(FIRST, GIVEN, sampling)]
        for each in (NEVER, WRONG)
    )
    assert right == wrong


@pytest.mark.parametrize("taken", [2, 3, 4, 7])
def test_left_in_the_middle_of_a_pass(taken: int, runtime: DashRuntime) -> None:
    """Tokens, state and figures are those of the tokens that were asked for."""
    text = [*FIRST, *runtime.session().generate(FIRST, GIVEN).tokens]
    live, plain = drafting(runtime, text, NEVER), runtime.session(draft="off")
    for session in (live, plain):
        stream = session.stream(FIRST, GIVEN)
        found = [next(stream) for _ in range(taken)]
        assert session.tokens == text[: len(FIRST) + taken - 1]
        assert found[-1].statistics.tokens == taken
        assert found[-1].statistics.passes == (1 + (taken - 2) // 6 if session is live else taken - 1)
    np.testing.assert_allclose(live.hidden, plain.hidden, atol=1e-4)
    assert live.generate(SECOND, 10).tokens.tolist() == plain.generate(SECOND, 10).tokens.tolist()


def test_ends_within_a_pass(runtime: DashRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the end of a turn, a stop string across two drafts, the number of tokens, or a call to stop."""
    answer = runtime.session().generate(FIRST, GIVEN).tokens.tolist()
    text = [*FIRST, *answer]
    place = next(at for at in range(8, 20) if answer[at] not in answer[:at])
    with monkeypatch.context() as patch:
        patch.setattr(runtime.text, "eos_ids", frozenset([answer[place]]))
        found = [*drafting(runtime, text, NEVER).stream(FIRST, GIVEN)]
        assert (tokens(found), found[-1].finish_reason) == (answer[: place + 1], "stop")
    plain = runtime.session(draft="off")
    whole = "".join(response.text for response in plain.stream(FIRST, GIVEN))
    for start in range(4, len(whole) - 3):
        stop = Sampling(stop=(whole[start : start + 3],))
        plain.reset()
        expected, found = (
            [*plain.stream(FIRST, GIVEN, stop)],
            [*drafting(runtime, text, NEVER).stream(FIRST, GIVEN, stop)],
        )
        assert tokens(found) == tokens(expected)
        assert "".join(response.text for response in found) == "".join(response.text for response in expected)
        if start > 12:
            break
    for most in (2, 3, 5, 9):
        found = [*drafting(runtime, text, NEVER).stream(FIRST, most)]
        assert (tokens(found), found[-1].finish_reason) == (answer[:most], "length")
    live, seen = drafting(runtime, text, NEVER), []
    for response in live.stream(FIRST, GIVEN):
        seen.append(response)
        if len(seen) == 4:
            live.cancel()
    assert (tokens(seen), seen[-1].finish_reason) == (answer[:5], "cancelled")


def test_the_context_is_full(runtime: DashRuntime) -> None:
    """The last places take no row behind them: accepted or refused, the same tokens up to the very last place."""
    most = runtime.engines.model.max_positions
    prompt = random_ids(most - 20, seed=5)
    expected = runtime.session(draft="off").generate(prompt, 20).tokens.tolist()
    found = {}
    for wrong in (WRONG, NEVER):
        live = drafting(runtime, [*prompt, *expected], wrong, count=15)
        responses = [*live.stream(prompt, 20, Sampling(logprobs=1))]
        found[wrong] = [response.logprobs for response in responses]
        assert tokens(responses) == expected
        assert live.context_left == 1
    assert found[WRONG] == found[NEVER]


def test_a_grammar(runtime: DashRuntime) -> None:
    """A refused draft leaves no trace in it; what it forbids is cut beforehand, what it forces is a draft."""
    schema = {"type": "object", "properties": {"name": {"const": "abcdefg"}, "n": {"type": "integer"}},
              "required": ["name", "n"]}  # fmt: skip
    sampling = Sampling(1.0, seed=3, grammar=json_grammar(schema))
    expected = [*runtime.session(draft="off").stream(FIRST, GIVEN, sampling)]
    for wrong in (WRONG, 2, NEVER):
        found = [*drafting(runtime, [*FIRST, *tokens(expected)], wrong).stream(FIRST, GIVEN, sampling)]
        assert tokens(found) == tokens(expected)
        assert found[-1].statistics.accepted > 0, "what the grammar forces"


@pytest.mark.parametrize("way", ["fork", "rewind", "restart", "chat"])
def test_a_text_that_goes_on_elsewhere(way: str, runtime: DashRuntime) -> None:
    """What guesses follows the text: after any way to another one it guesses what it would in a new session."""
    made: list[Any] = []

    class Noted(Drafts):
        def several(self, context: int) -> bool:  # noqa: ARG002
            return True

        def guesses(self, ask: Ask | None, context: int, most: int) -> list[int]:
            found = super().guesses(ask, context, most)
            made.append((*self._lookup.tokens, -1, *found))
            return found

    def new_drafts() -> Drafts:
        return Noted(COSTS)

    def session() -> Session:
        return replace(runtime.session(), new_drafts=new_drafts)

    repeating = [*FIRST, *FIRST, *FIRST[:6]]
    live = session()
    live.generate(repeating, 12)
    text = [*live.tokens, *live._pending]
    messages = [{"role": "user", "content": "abc abc abc abc abc abc"}]
    if way == "fork":
        live = live.fork()
        live.generate(SECOND[:2], 12)
        expected: Callable[[Session], Any] = lambda new: new.generate([*text, *SECOND[:2]], 12)  # noqa: E731
    elif way == "rewind":
        live.rewind_to([*FIRST, *FIRST, 5, 6])
        live.generate([*FIRST, *FIRST, 5, 6, *FIRST[:4]][len(live.tokens) :], 12)
        expected = lambda new: new.generate([*FIRST, *FIRST, 5, 6, *FIRST[:4]], 12)  # noqa: E731
    elif way == "restart":
        live.restart([*SECOND, *SECOND, *SECOND[:3]])
        live.generate(SECOND[3:6], 12)
        expected = lambda new: new.generate([*SECOND, *SECOND, *SECOND[:6]], 12)  # noqa: E731
    else:
        [*live.chat(messages, 12)]
        expected = lambda new: [*new.chat(messages, 12)]  # noqa: E731
    found = made[-1]
    made.clear()
    expected(session())
    assert found == made[-1]


def test_a_single_row_of_a_batch_drafts(runtime: DashRuntime) -> None:
    """Several rows together do not, and each has the text that it would have alone."""
    asked = [FIRST, SECOND]
    answers = [runtime.session(draft="off").generate(ids, 20).tokens.tolist() for ids in asked]
    batch = runtime.batch(2)
    for index, ids in enumerate(asked):
        batch.prompts.new_drafts = lambda index=index, ids=ids: Scripted([*ids, *answers[index]], 3)
        found = [response for _, response in batch.stream([ids], 20)]
        assert tokens(found) == answers[index]
        assert found[-1].statistics.accepted > 5
    assert batch.rows.decode_steps < 2 * 19
    told: dict[int, list[int]] = {0: [], 1: []}
    for index, response in batch.stream([FIRST, SECOND], 20):
        told[index].append(response.token)
    assert [told[0], told[1]] == answers


def test_what_cannot_be_drafted(runtime: DashRuntime, setting_of: Callable[[str], dict[str, Any]]) -> None:
    for kind in ("static", "token"):
        with pytest.raises(PolicyError, match="dense session"):
            runtime.session(**setting_of(kind), draft="lookup")
        assert runtime.session(**setting_of(kind))._drafts is None, "a pass of several rows would break its bounds"
    with pytest.raises(PolicyError, match="for 'cpu-fp32' has no"):
        runtime.session(draft="layer")
    with pytest.raises(PolicyError, match="draft = 'eagle' is not one of"):
        runtime.session(draft="eagle")
    assert runtime.session(draft="off")._drafts is None
