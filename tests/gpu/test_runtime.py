"""SmolLM2 on the device: every mode, against the CPU and against each other."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dash_export import DashRuntime
from dash_export.backends.cuda.step import DeviceStep
from dash_export.backends.maker import backend_of
from dash_export.building import build
from dash_export.bundle.recipe import load_recipe
from dash_export.core.rule import DENSE, ForcedRule, decision_rule, static_rule
from dash_export.core.sampling import Sampler, Sampling
from dash_export.files.resources import resource_folder
from dash_export.runtime.rows import Rows
from tests.runtime.prompts import prompts
from tests.tiny import random_actions

pytestmark = [pytest.mark.gpu, pytest.mark.model]

MODES = ("sync", "overlapped", "device")
# Root mean square of the logit difference over that of the logits, by the coarsest precision of the build.
TOLERANCE = {"fp32": 1e-3, "fp16": 0.02, "bf16": 0.05, "int8": 0.06, "fp8": 0.3, "int4": 0.35}
NEAR = 0.05
"""A decision may differ where the damage is this close to the limit, relatively: 16-bit activations."""
LoadGpu = Callable[[str], DashRuntime]


def tolerance(runtime: DashRuntime) -> float:
    weights = runtime.recipe.weights
    return max(TOLERANCE[precision] for precision in (weights.layers, weights.qkv, weights.ungated, weights.head))


def recorded(runtime: DashRuntime) -> DashRuntime:
    """Skips where no token can be a graph: ONNX Runtime's runs cannot be recorded."""
    if runtime.build.backend == "onnxruntime_cuda":
        pytest.skip("ONNX Runtime's runs cannot be recorded")
    return runtime


def prose(runtime: DashRuntime, count: int) -> np.ndarray:
    text = (resource_folder("calibration") / "heldout.txt").read_text(encoding="utf-8")
    return np.array(runtime.text.encode(text)[:count], np.int64)


@pytest.mark.parametrize("dispatch", MODES)
@pytest.mark.parametrize("share", [0.0, 0.3])
def test_logits_are_those_of_the_cpu(
    share: float, dispatch: str, gpu_runtime: LoadGpu, cpu_runtime: DashRuntime
) -> None:
    """Every engine, those of units and their bypasses, token by token."""
    runtime, ids = gpu_runtime(dispatch), prose(cpu_runtime, 96)
    actions = random_actions(len(ids), 30, runtime.bundle.manifest.policy.units, share=share)
    expected = cpu_runtime.session().logits(ids, actions=actions)
    found = runtime.session().logits(ids, actions=actions)
    error = np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2))
    assert error < tolerance(runtime)


@pytest.mark.parametrize("dispatch", ["overlapped", "device"])
def test_modes_give_the_same_tokens(dispatch: str, gpu_runtime: LoadGpu) -> None:
    """They share engines, and skip something."""
    runtime, sync, skipped = gpu_runtime(dispatch), gpu_runtime("sync"), 0
    for ids in prompts(runtime):
        for setting in ({"policy": "dense"}, {"policy": "static", "skipped": 4}, {"policy": "token", "skipped": 5}):
            one, other = (each.generate(ids.tolist(), 48, **setting) for each in (sync, runtime))
            np.testing.assert_array_equal(one.actions, other.actions)
            np.testing.assert_array_equal(one.tokens, other.tokens)
            skipped += int(one.actions.sum())
    assert skipped


def test_a_step_is_one_graph(gpu_runtime: LoadGpu) -> None:
    """Not what `device` falls back to."""
    runtime = recorded(gpu_runtime("device"))
    session = runtime.session("token", skipped=5)
    session.generate(list(range(5, 25)), 8)
    assert runtime.dispatch == "device", "see the log for what cannot be recorded here"
    step = session.bound(1)
    assert isinstance(step, DeviceStep)
    assert (None, 0, False) in step._graphs
    runtime.session("dense").generate(list(range(5, 25)), 8)
    assert runtime.engines.records, "a token whose actions are known is a graph too"  # type: ignore[union-attr]


@pytest.mark.parametrize("dispatch", ["overlapped", "device"])
def test_tokens_launched_ahead_are_those_waited_for(dispatch: str, gpu_runtime: LoadGpu) -> None:
    runtime = recorded(gpu_runtime(dispatch))
    assert runtime.engines.launches_ahead, "see the log for why not"  # type: ignore[union-attr]
    for setting in ({"policy": "dense"}, {"policy": "static", "skipped": 4}, {"policy": "token", "skipped": 5}):
        for ids in prompts(runtime):
            answer = runtime.session(**setting).generate(ids.tolist(), 48).tokens.tolist()
            session = runtime.session(**setting)
            token, waited = int(session.prefill(ids).argmax()), []
            for _ in answer:
                waited.append(token)
                token = int(session.decode_one(token)[0].argmax())
            assert answer == waited


@pytest.mark.parametrize("sampling", [Sampling(0.8, seed=1), Sampling(1.0, top_k=40, top_p=0.9, seed=2)], ids=str)
def test_a_token_that_is_drawn_ahead_is_the_host_s(
    sampling: Sampling, gpu_runtime: LoadGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nearly always the device draws it, too: then nothing is decoded twice."""
    runtime, drew = recorded(gpu_runtime("device")), list[bool]()
    ids, sound = prompts(runtime)[0], DeviceStep._drew
    monkeypatch.setattr(DeviceStep, "_drew", lambda *given: drew.append(sound(*given)) or drew[-1])
    answer = [one.token for one in runtime.session("dense").stream(ids.tolist(), 96, sampling)]
    other, sampler = runtime.session("dense"), Sampler(sampling)
    logits, waited = other.prefill(ids), list[int]()
    for _ in answer:
        waited.append(sampler(logits, other.tokens))
        logits, _ = other.decode_one(waited[-1])
    assert answer == waited
    assert sum(drew) >= len(answer) - 8


def test_prompts_are_decode(gpu_runtime: LoadGpu) -> None:
    """A pass over many tokens, of the other profile, fills the cache as single tokens do."""
    runtime = gpu_runtime("overlapped")
    ids = prose(runtime, 64)
    one, other = runtime.session(), runtime.session()
    expected = one.prefill(ids)
    for token in ids:
        found = other.decode_one(int(token))[0]
    assert np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)) < tolerance(runtime)


def test_several_sequences(target: str, gpu_bundle: Path, tmp_path: Path) -> None:
    """Decoded together, under a profile of their own, each has the logits that it has alone, up to rounding."""
    pytest.importorskip("onnx", reason="other engines have to be lowered first")
    recipe = resource_folder("engines") / f"{target}.toml"
    if not recipe.is_file():
        pytest.skip(f"{target} has no recipe of its own to write another from")
    (tmp_path / "together.toml").write_text(recipe.read_text().replace("[engine]\n", "[engine]\nsequences = 4\n"))
    build(gpu_bundle, str(tmp_path / "together.toml"))
    runtime = DashRuntime.load(gpu_bundle, "together", dispatch="device")
    rows, alone, ids = Rows(runtime.engines, 4, 256), runtime.session(), prose(runtime, 200)
    rows.cache.reserve(100)
    step = rows.steps.bound(1, batch=4)
    for rule in (DENSE, static_rule((0, 2))):
        expected = []
        for row, length in enumerate((9, 40, 64, 23)):
            alone.restart(ids[row : row + length])
            rows.cache.take(row, alone.cache)
            expected.append(alone.decode_one(int(ids[100 + row]), rule)[0])
        step.decode_batch(ids[100:104].tolist(), [rule] * 4)
        error = np.sqrt(np.mean((step.logits[:, 0] - np.array(expected)) ** 2) / np.mean(np.square(expected)))
        assert error < NEAR


def test_decisions_are_those_of_the_cpu(gpu_runtime: LoadGpu, cpu_runtime: DashRuntime) -> None:
    """With the same actions forced, over 2,000 tokens: fewer than 0.5 % differ, and only near the limit."""
    runtime = gpu_runtime("sync")
    units, cost = runtime.bundle.manifest.policy.units, cpu_runtime.cost.cost
    damages = []
    for ids in np.split(prose(cpu_runtime, 2048), 8):
        actions = random_actions(len(ids), 30, units, share=0.2)
        sessions = [each.session() for each in (cpu_runtime, runtime)]
        damages.append([session.score(ids, actions=actions).damage[2:] for session in sessions])
    expected, found = (np.concatenate([pair[which] for pair in damages]) for which in (0, 1))
    limits = np.array(decision_rule(units, cost, float(np.quantile(expected, 0.2)) / max(cost)).limits)
    differs = (found < limits) != (expected < limits)
    assert differs.mean() < 0.005
    assert (np.abs(expected[differs] / np.broadcast_to(limits, expected.shape)[differs] - 1) < NEAR).all()


def test_pictures_leave_where_they_do_on_the_cpu(target: str, tmp_path: Path) -> None:
    """A tiny encoder, built here: pictures that leave at different exits, then all of them dense."""
    if not backend_of(load_recipe(target)).encodes:
        pytest.skip(f"{target} has no engines for encoders")
    for package in ("onnxruntime", "onnx", "transformers"):
        pytest.importorskip(package, reason=f"no {package} here to make an encoder and to compare it with")
    from tests.tiny_encoder import UNITS, encoder_bundle, random_pixels

    root, pixels = encoder_bundle(tmp_path), random_pixels(40)
    build(root, target)
    host, runtime = (DashRuntime.load(root, name).encoder() for name in ("portable", target))
    first = np.random.default_rng(3).integers(0, len(UNITS) + 1, len(pixels))
    for rule in (ForcedRule(np.arange(len(UNITS))[:, None] >= first), DENSE):
        found, expected = (each.under(rule).encode(pixels) for each in (runtime, host))
        np.testing.assert_array_equal(found.actions, expected.actions)
        error = np.sqrt(np.mean((found.pooled - expected.pooled) ** 2) / np.mean(expected.pooled**2))
        assert error < TOLERANCE["bf16"]
