"""What a device gives, in every dialect, dispatch and order of its streams, is what the CPU gives."""

import gc
import logging
import threading
import weakref
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import cuda.bindings.runtime as rt
import numpy as np
import pytest

from dash_export import DashRuntime
from dash_export.backends.cuda import step
from dash_export.backends.cuda.cuda import Cuda
from dash_export.backends.cuda.step import DeviceStep
from dash_export.backends.tensorrt.tensorrt import TensorRT
from dash_export.building import build
from dash_export.building.exporting import export
from dash_export.bundle.bundle import Bundle
from dash_export.bundle.records import Segment
from dash_export.core.policy import no_policy
from dash_export.core.rule import DENSE, ForcedRule, decision_rule, static_rule
from dash_export.core.units import Unit, layer_actions
from dash_export.errors import BackendError, BundleError, ContextLengthError, PolicyError, RequestError
from tests.backends.cuda.conftest import BUILDS, DISPATCH, IDS, ORDERS, TOLERANCE, Host, MakeOnCard, built, decoded
from tests.standin.cuda import Card
from tests.standin.trt import Context
from tests.tiny import TINY_UNITS, random_actions, tiny_checkpoint, tiny_policy

NOT_HERE = rt.cudaError_t.cudaErrorStreamCaptureUnsupported


CASES = [
    *((target, *rest) for target in ("trt10", "portable") for rest in product(DISPATCH[1:], ORDERS)),
    *((target, "sync", "beside") for target in BUILDS),
    *(("rtx", dispatch, 1) for dispatch in DISPATCH[1:]),
]


@pytest.mark.parametrize(("target", "dispatch", "first"), CASES)
def test_decode(target: str, dispatch: str, first: str | int, on_card: MakeOnCard, host: Host) -> None:
    made = on_card(target, dispatch, first)
    actions = host.decoded[1]
    assert 0.2 < actions[:, 2:5].mean() < 0.8
    assert (actions[:, 2] == actions[:, 3]).all(), "one unit"
    assert not host.differs(made)
    pieces = 5 + len(TINY_UNITS) + 1
    assert len(made.card.recorded) == (1 if dispatch == "device" else pieces), "recordings serve every token"


@pytest.mark.parametrize("dispatch", DISPATCH)
def test_score(dispatch: str, on_card: MakeOnCard, host: Host) -> None:
    """Token by token, it is what one pass on the host gives; under forced actions too."""
    runtime, actions = on_card("trt10", dispatch).runtime, random_actions(60, 6, TINY_UNITS)
    session = runtime.session_under(host.rule)
    session.score(IDS[:5])
    for forced in (None, actions):
        found, expected = (
            each.score(IDS, actions=forced, keep_logits=True)
            for each in (session, host.runtime.session_under(host.rule))
        )
        np.testing.assert_array_equal(found.actions, expected.actions)
        asked = slice(2 if forced is None else 0, None)
        np.testing.assert_allclose(found.damage[asked], expected.damage[asked], atol=1e-5)
        assert found.damage[:2].any() == (forced is not None), "nobody asked about a prompt"
        assert np.abs(found.logits - expected.logits).max() < TOLERANCE  # type: ignore[operator]


@pytest.mark.parametrize("dispatch", ["overlapped", "device"])
def test_max_layers(dispatch: str, on_card: MakeOnCard, host: Host) -> None:
    for most in (3, 4):
        assert not host.differs(on_card("trt10", dispatch), host.limited(most))


def test_one_recording_serves_every_rule(on_card: MakeOnCard, host: Host) -> None:
    """Launched steps between go through the same memory; the graph that follows does not see them."""
    made = on_card("trt10", "device")
    live = [each.session() for each in (host.runtime, made.runtime)]
    for session in live:
        session.prefill(IDS[:20])
    every = np.ones((2, 1), np.bool_)
    for token, factor in zip(IDS[20:40].tolist(), np.geomspace(0.1, 10, 20), strict=True):
        for rule in (host.rule.scaled(float(factor)), ForcedRule(every)):
            (expected, actions), (found, taken) = (session.decode_one(token, rule) for session in live)
            np.testing.assert_array_equal(taken, actions)
            assert np.abs(found - expected).max() < TOLERANCE
            one, other = (session.bound(1).damage for session in live)
            np.testing.assert_allclose(one, other, atol=1e-5)
        np.testing.assert_array_equal(taken, layer_actions(every, TINY_UNITS, 6)[0])
    assert len(made.card.recorded) == 1 + 8, "and the pieces of the others"


@pytest.mark.parametrize(("target", "dispatch"), zip(BUILDS, DISPATCH, strict=True))
def test_known_actions_are_graphs_of_their_own(
    target: str, dispatch: str, on_card: MakeOnCard, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A set's graph serves all its tokens; those of the sets that were wanted last are kept."""
    monkeypatch.setattr(step, "GRAPHS", 2)
    made = on_card(target, dispatch, 1)
    live = [each.session() for each in (host.runtime, made.runtime)]
    for session in live:
        session.prefill(IDS[:20])
    recorded = []
    for token, places in zip(IDS[20:].tolist(), ((), (0,), (), (0, 1), (0,), (), ()), strict=False):
        rule = static_rule(places)
        (expected, actions), (found, taken) = (session.decode_one(token, rule) for session in live)
        np.testing.assert_array_equal(taken, actions)
        assert np.abs(found - expected).max() < TOLERANCE
        recorded.append(len(made.card.recorded))
    assert recorded == [1, 2, 2, 3, 4, 5, 5]


def test_a_device_that_records_nothing(on_card: MakeOnCard, host: Host, caplog: pytest.LogCaptureFixture) -> None:
    for rule in (DENSE, None):
        made = on_card("trt10", "overlapped", 0)
        made.card.failing["cudaStreamBeginCapture"] = NOT_HERE
        caplog.clear()
        assert not host.differs(made, rule)
        made.runtime.session_under(host.rule).generate(IDS[:9].tolist(), 3)
        assert not made.runtime.engines.records  # type: ignore[union-attr]
        assert not made.card.recorded
        (said,) = caplog.records
        assert said.levelname == "WARNING"
        assert "steps are not recorded here (CUDA on a card failed beginning to record" in said.message


@pytest.mark.parametrize("what", ["a step", "a fork"])
def test_threads_take_turns(what: str, on_card: MakeOnCard, host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one enqueued while another records, a fork's copies too, would become part of the recording."""
    made, sound, done = on_card("trt10", "device"), Cuda.graph, list[Any]()
    other = made.runtime.session()
    other.prefill(IDS[:17])

    def beside() -> None:
        if what == "a fork":
            done.append(other.fork())
        done.append((done[0] if done else other).generate(IDS[17:19].tolist(), 5).tokens)

    thread = threading.Thread(target=beside)

    def graph(*given: Any) -> Any:
        if thread.ident is None:
            thread.start()
            thread.join(0.3)
            assert (done, len(other.tokens)) == ([], 17), "work of another thread during a recording"
        return sound(*given)

    monkeypatch.setattr(Cuda, "graph", graph)
    assert not host.differs(made)
    thread.join()
    np.testing.assert_array_equal(done[-1], host.runtime.generate(IDS[:19].tolist(), 5).tokens)


def test_kernels_for_prompts_are_compiled_beside_the_work(on_card: MakeOnCard) -> None:
    """Where its length is another one every time, and the first would wait. Whole chunks come again, and what is
    recorded keeps the kernels that it had.
    """
    made = on_card("rtx", "device")
    session = made.runtime.session()
    session.prefill(IDS[:20])
    session.decode_one(5)
    eager = {(context.shapes["position_ids"][1], context.captures) for _, context in made.card.ran if context.profile}
    assert eager == {(16, True), (4, False)}
    assert all(context.captures for _, context in made.card.ran if not context.profile)


def test_what_a_context_does_not_take_is_told(on_card: MakeOnCard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Context, "set_optimization_profile_async", Mock(side_effect=RuntimeError("odd")))
    with pytest.raises(BackendError, match=r"has no profile 1 \(odd\): build it again"):
        on_card("trt10").runtime.session().prefill(IDS[:20])


def test_a_step_that_cannot_be_recorded(on_card: MakeOnCard, host: Host, caplog: pytest.LogCaptureFixture) -> None:
    """One line that says why, not one a session, and `overlapped`."""
    made = on_card("trt10", "device")
    made.card.version = 12020
    with caplog.at_level(logging.WARNING):
        assert not host.differs(made)
        assert not host.differs(made)
    assert [record.message for record in caplog.records] == [
        "dispatch 'device' is not possible here (the driver has CUDA 12.2, and graphs with decisions need 12.4): "
        "this is 'overlapped'"
    ]
    assert made.runtime.dispatch == "overlapped"
    with pytest.raises(PolicyError, match="'device' needs the streams of a GPU"):
        DashRuntime.load(host.runtime.bundle.root, "cpu-fp32", dispatch="device")


def test_a_model_without_units(tmp_path: Path, card: Card) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "model", num_hidden_layers=2)
    root = export(checkpoint, tmp_path / "tiny.dash", no_policy(2, ())).root
    made = built(root, tmp_path / "whole.toml")
    assert list(made.engines) == ["layers_00-01"]
    card.forget()
    DashRuntime.load(root, "whole", dispatch="device").generate(IDS[:9].tolist(), 4)
    launched = [of for _, what, of in card.log if what in ("run", "launch")]
    assert launched == ["layers_00-01"] * 6, "the prompt, before a recording, the tokens and one more"


def test_a_policy_that_reads_the_embedding(tmp_path: Path, card: Card) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "model", num_hidden_layers=4)
    policy = tiny_policy(checkpoint, "linear", units=(Unit(1, 2),))
    bundle = export(checkpoint, tmp_path / "tiny.dash", policy)
    build(bundle, "cpu", weights="fp32")
    host = DashRuntime.load(bundle.root, "cpu-fp32")
    rule = decision_rule(policy.units, (1.0,), float(np.median(host.session().score(IDS).damage[20:])))
    card.run_in_order_of(1)
    built(bundle.root, tmp_path / "mine.toml", dialect="portable")
    expected, actions = decoded(host, rule)
    assert 0.2 < actions[:, 1].mean() < 0.8
    for dispatch in DISPATCH[1:]:
        found, taken = decoded(DashRuntime.load(bundle.root, "mine", dispatch=dispatch), rule)
        np.testing.assert_array_equal(taken, actions)
        assert np.abs(found - expected).max() < TOLERANCE


CUTS = {
    "elsewhere": (1, [Segment(0, -1, True, False, False), Segment(0, 1, False, False, False)]),
    "nowhere": (0, [Segment(0, 1, True, False, False)]),
}
"""(what the policy reads, segments before the first unit)"""


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("change", ["no policy", *CUTS])
def test_a_build_that_cannot_ask(change: str, device_bundle: Bundle) -> None:
    """A missing policy would be no damage, and no damage is always skipped."""
    bundle = Bundle.open(device_bundle.root)
    made = bundle.load_build("trt10")
    if change == "no policy":
        made = replace(made, engines={name: each for name, each in made.engines.items() if name != "policy"})
    else:
        read, segments = CUTS[change]
        bundle.manifest = replace(bundle.manifest, policy=replace(bundle.manifest.policy, read=read))
        engines = made.engines | {segment.name: made.engines["layer_00"] for segment in segments}
        made = replace(made, segments=(*segments, *made.segments[2:]), engines=engines)
    with pytest.raises(BundleError, match="cannot ask its policy"):
        DashRuntime(bundle, made, TensorRT("tensorrt"), "overlapped")


def test_a_prompt_takes_the_memory_of_the_one_before(on_card: MakeOnCard, host: Host) -> None:
    made = on_card("trt10")
    sessions = [each.session() for each in (host.runtime, made.runtime)]
    allocated = []
    for length in (9, 12, 5, 7, 11):
        expected, found = (session.restart(IDS[length : 2 * length]) for session in sessions)
        assert np.abs(found - expected).max() < TOLERANCE
        allocated.append(made.card.calls["cudaMalloc"] + made.card.calls["cudaHostAlloc"])
    assert allocated[1] > allocated[0], "the longer one needs more"
    assert allocated[1:] == [allocated[1]] * 4


@pytest.mark.parametrize("dispatch", ["overlapped", "device"])
def test_a_dropped_step_gives_back_its_contexts(dispatch: str, on_card: MakeOnCard, host: Host) -> None:
    """At once, not when Python looks for circles: nothing tells it how much of a device's memory they hold."""
    made = on_card("trt10", dispatch)
    session = made.runtime.session_under(host.rule)
    session.generate(IDS[:12].tolist(), 3)
    gc.collect()
    gc.disable()
    try:
        steps = [session.bound(1), session.bound(7)]
        assert all(isinstance(step, DeviceStep) for step in steps)
        contexts = [weakref.ref(step.parts[3].run) for step in steps]  # type: ignore[attr-defined]
        del steps
        session.steps.unbind()
        made.card.ran.clear()
        made.card.recorded.clear()
        assert [context() for context in contexts] == [None, None]
    finally:
        gc.enable()


def test_what_a_device_does_not_do(on_card: MakeOnCard) -> None:
    """Own policies read the state on the host; embeddings and final states stay on the device."""
    runtime = on_card().runtime
    with pytest.raises(BackendError, match="decode 1 together, not 2: build by a recipe with more `sequences`"):
        runtime.batch(2)
    assert runtime.session().context_left == 96, "the context is the cache"
    with pytest.raises(ContextLengthError, match="96 positions"):
        runtime.generate(list(range(90)), 10)
    with pytest.raises(PolicyError, match="runs on CPU builds only"):
        runtime.session_under(SimpleNamespace(begin=print, skips=print))
    session = runtime.session()
    session.prefill(IDS[:3])
    with pytest.raises(RequestError, match="takes no embeddings"):
        session.embed(IDS[:3])
    with pytest.raises(RequestError, match="takes no embeddings"):
        session.prefill(embeddings=np.zeros((2, 64)))
    with pytest.raises(RequestError, match="gives no states"):
        _ = session.hidden


@pytest.mark.parametrize(("dispatch", "first"), [("overlapped", "beside"), ("overlapped", 1), ("sync", "main")])
def test_a_launch_that_fails(
    dispatch: str, first: str | int, on_card: MakeOnCard, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is under way is left to end, and the session goes on from before the step."""
    runtime = on_card("trt10", dispatch, first).runtime
    live, other = runtime.session_under(host.rule), runtime.session_under(host.rule)
    for session in (live, other):
        session.prefill(IDS[:20])
        session.decode_one(5)  # all is recorded
    sound, launched = Card.cudaGraphLaunch, 0
    for number, token in enumerate(IDS[20:26].tolist()):

        def failing(card: Card, graph: Any, stream: int, last: int = number % 4) -> Any:
            nonlocal launched
            launched += 1
            return sound(card, graph, stream) if launched <= last else (rt.cudaError_t.cudaErrorLaunchFailure,)

        launched = 0
        monkeypatch.setattr(Card, "cudaGraphLaunch", failing)
        with pytest.raises(BackendError, match="failed launching a step"):
            live.decode_one(token)
        monkeypatch.undo()
        assert live.tokens == other.tokens
        found, expected = (session.decode_one(token)[0] for session in (live, other))
        np.testing.assert_array_equal(found, expected)
