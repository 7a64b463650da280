"""Builds: incremental, exact about what depends on what, with a cost table and a budget table."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

from dash_export import DashRuntime
from dash_export.backends.cuda.cuda_maker import CudaBackend
from dash_export.building import build, dial_table, pipeline
from dash_export.building.cost_table import NOT_MEASURED
from dash_export.building.exporting import export
from dash_export.bundle.bundle import Bundle
from dash_export.bundle.layout import ANSWERS
from dash_export.core.dial import DialPoint
from dash_export.errors import BackendError, BundleError, PolicyError
from dash_export.models import Checkpoint
from dash_export.text.chats import chats_text
from tests.commands.helpers import done, python
from tests.forged import edit
from tests.tiny import log_softmax, random_ids, tiny_policy, with_bypasses


@pytest.fixture
def bundle(own_bundle: Path) -> Bundle:
    return Bundle.open(own_bundle)


READ_ONLY = """
import errno, os, sys
from pathlib import Path
from dash_export.building import build
from dash_export.building.exporting import export
from dash_export.models import open_checkpoint
from tests.tiny import tiny_policy

root, checkpoint = Path(sys.argv[1]), open_checkpoint(sys.argv[2])

def refuse(event, given):
    writes = event == "open" and given[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    changes = writes or event in ("os.rename", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink")
    if changes and str(given[0]).startswith(str(root.parent)) and not (event == "os.mkdir" and os.path.isdir(given[0])):
        raise OSError(errno.EROFS, "Read-only file system", str(given[0]))

sys.addaudithook(refuse)
export(checkpoint, root, tiny_policy(checkpoint, "linear"))
build(root, "cpu", weights="fp32")
build(root, "cpu", weights="int8")
"""


def test_nothing_is_written_where_nothing_is_to_be_done(bundle: Bundle, tiny_root: Path) -> None:
    """A bundle on a read-only disk counts as exported and built; what is not there cannot be made."""
    ran = python(READ_ONLY, bundle.root, tiny_root.parent / "model")
    assert ran.stderr.splitlines()[-1].startswith("OSError: [Errno 30] Read-only file system"), ran.stderr
    assert "int8" in ran.stderr.splitlines()[-1]


@pytest.mark.parametrize("asked", [True, False])
def test_measured_again(asked: bool, bundle: Bundle, made: list[str]) -> None:
    before = bundle.load_build("cpu-fp32")
    if not asked:
        edit(bundle.path("engines/cpu-fp32/build.json"), lambda data: data.update(measuring=0))
    again = build(bundle, "cpu", weights="fp32", measure=asked)
    assert made == []
    assert again.engines == before.engines
    assert again.measuring == pipeline.MEASURING_REVISION > 0
    assert again.cost.segment_us != before.cost.segment_us
    assert again.dial != before.dial
    assert again == bundle.load_build("cpu-fp32")


@pytest.mark.parametrize(("name", "measure"), [("onnx/policy.onnx", False), ("tokenizer.json", True)])
def test_what_a_build_only_reads_is_hashed_too(name: str, measure: bool, bundle: Bundle) -> None:
    """Of the policy it takes the bias, and by the tokenizer the dial is calibrated; no engine is made of them anew."""
    before, damaged = bundle.load_build("cpu-fp32"), bytearray(bundle.path(name).read_bytes())
    damaged[-20] ^= 1
    bundle.path(name).write_bytes(damaged)
    with pytest.raises(BundleError, match=rf"{name} is not the file that was written"):
        build(bundle, "cpu", weights="fp32", measure=measure)
    assert Bundle.open(bundle.root).load_build("cpu-fp32") == before


@pytest.mark.parametrize("graphs", [False, True])
def test_a_tokenizer_that_changes_while_the_dial_is_calibrated(graphs: bool, bundle: Bundle) -> None:
    before, path = bundle.load_build("cpu-fp32"), bundle.path("tokenizer.json")
    if not graphs:
        shutil.rmtree(bundle.path("onnx"))

    def change(name: str, *_: object) -> None:
        if name == "calibrating the dial":
            path.write_bytes(path.read_bytes())

    with pytest.raises(BundleError, match=r"tokenizer\.json was replaced while it was read"):
        build(bundle, "cpu", weights="fp32", measure=True, progress=change)
    assert Bundle.open(bundle.root).load_build("cpu-fp32") == before


def test_costs_measured_beside_other_load(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """They are measured again; the quietest are taken, or those of a quiet build before."""
    quiet = build(bundle, "portable").cost
    loads = iter((0.9, 0.5, 0.7, 0.9, 0.1, 0.9, 0.8, 0.6))
    monkeypatch.setattr(pipeline, "measure_cost", lambda *_: replace(quiet, dense_us=7.0, others=next(loads)))
    monkeypatch.setattr(pipeline, "PAUSE", 0.0)

    def measured(before: float) -> float:
        known = bundle.load_build("portable")
        bundle.save_build(replace(known, cost=replace(quiet, others=before)))
        return build(bundle, "portable", measure=True).cost.others

    assert measured(before=0.9) == 0.5
    assert measured(before=0.9) == 0.1
    assert "kept" not in caplog.text
    assert measured(before=0.0) == 0.0
    assert "0.6 processors work for others, 0.0 are withheld by the host: the costs and the dial" in caplog.text


@pytest.mark.parametrize("other", ["machine", "measuring"])
def test_what_another_machine_or_an_earlier_version_measured_is_not_kept(
    other: str, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even beside load, where a copy without graphs is measured: the processor's name does not tell its cores."""
    known = bundle.load_build("cpu-fp32")
    wrong = (*known.dial[:-1], replace(known.dial[-1], kl=123.0))
    before = {"device": "the same, 64 cores"} if other == "machine" else {"measuring": pipeline.MEASURING_REVISION - 1}
    bundle.save_build(replace(known, cost=replace(known.cost, others=0.0), dial=wrong, **before))  # type: ignore[arg-type]
    shutil.rmtree(bundle.path("onnx"))
    monkeypatch.setattr(pipeline, "measure_cost", lambda *_: replace(known.cost, dense_us=7.0, others=0.9))
    monkeypatch.setattr(pipeline, "PAUSE", 0.0)
    made = build(bundle, "cpu", weights="fp32", measure=True)
    assert (made.device, made.cost.dense_us, made.measuring) == (known.device, 7.0, pipeline.MEASURING_REVISION)
    assert made.dial[-1].kl != 123.0


def test_a_unit_that_saves_nothing_takes_no_point_of_the_dial(tiny_runtime: Callable[..., DashRuntime]) -> None:
    runtime = tiny_runtime()
    items = dial_table._calibration_items(runtime)[:2]

    def points(*cost: float) -> list[float]:
        return dial_table._trade_offs(Mock(wraps=runtime, cost=replace(runtime.cost, cost=cost)), items)

    assert max(points(0.25, 0.0)) < 1e4
    assert len(points(0.0, 0.0)) > 2


def test_nothing_is_measured_where_it_cannot_run(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CudaBackend, "run_obstacle", lambda _: "there is no such device.")
    with pytest.raises(BackendError, match="Nothing can be measured here: there is no such device"):
        build(bundle, "cuda", measure=True)


def test_another_policy_network_makes_only_what_gives_its_damage(
    bundle: Bundle, tiny_model: Checkpoint, made: list[str]
) -> None:
    other = replace(tiny_policy(tiny_model, "linear"), network=tiny_policy(tiny_model, seed=7).network, origin="other")
    changed = export(tiny_model, bundle.root, other)
    made.clear()
    build(changed, "cpu", weights="fp32")
    assert made == ["layers_00-01"]
    assert DashRuntime.load(bundle.root, "cpu-fp32").generate([1, 2], 3).tokens.size == 3


def test_a_policy_whose_damages_are_no_numbers(bundle: Bundle, tiny_model: Checkpoint) -> None:
    policy = tiny_policy(tiny_model, "linear")
    assert policy.network is not None
    huge = {name: np.full_like(array, 3e38) for name, array in policy.network.items()}
    changed = export(tiny_model, bundle.root, replace(policy, network=huge))
    with pytest.raises(PolicyError, match="damages that are no numbers: train it again"):
        build(changed, "portable")


def test_another_bypass_keeps_the_layers(bundle: Bundle, tiny_model: Checkpoint, made: list[str]) -> None:
    changed = export(tiny_model, bundle.root, with_bypasses(tiny_policy(tiny_model, "linear"), tiny_model.spec, seed=2))
    made.clear()
    build(changed, "cpu", weights="fp32")
    assert set(made) == {f"{kind}_{name}" for kind in ("bypass", "mixed") for name in ("02-03", "04-04")}


def test_a_damaged_engine_is_made_again(bundle: Bundle, made: list[str]) -> None:
    path = bundle.path("engines/cpu-fp32/bypass_02-03.onnx")
    sound = path.read_bytes()
    path.write_bytes(b"damaged")
    message = r"bypass_02-03.onnx is not the file .* build \S+ --target cpu-fp32"
    with pytest.raises(BundleError, match=message):
        DashRuntime.load(bundle.root, "cpu-fp32")
    build(bundle, "cpu", weights="fp32")
    assert made == ["bypass_02-03", "mixed_02-03"], "and what takes up its weights"
    assert path.read_bytes() == sound


def test_a_kill_before_what_takes_up_the_weights_of_an_engine_made_again(bundle: Bundle, made: list[str]) -> None:
    """The next run finds the engine as it should be, and must not take what was made of an earlier one."""
    bundle.path("engines/cpu-fp32/bypass_02-03.onnx").write_bytes(b"damaged")

    def kill(name: str, *_: object) -> None:
        if name == "bypass_02-03":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(bundle, "cpu", weights="fp32", progress=kill)
    build(bundle, "cpu", weights="fp32")
    assert made == ["bypass_02-03", "mixed_02-03"]


def test_the_dial_by_hand(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """One setting, decoded token by token: layers, time, and KL from dense written out in float64."""
    monkeypatch.setattr(dial_table, "WINDOWS", 2)
    monkeypatch.setattr(dial_table, "TOKENS", 48)
    monkeypatch.setattr(dial_table, "SHARES", (0.5,))
    made = build(bundle, "cpu", weights="int8")
    runtime = DashRuntime.load(bundle.root, made.target)
    items = dial_table._calibration_items(runtime)
    assert [(len(ids), prefix) for ids, prefix in items] == [(48, 24), (48, 24)]
    costs, points = made.cost, made.dial
    assert len(costs.cost) == 2
    assert all(0 < cost < 1 for cost in costs.cost)
    assert costs.dense_us == pytest.approx(sum(costs.segment_us.values()), rel=1e-3)
    assert [point.trade_off for point in points] == sorted(point.trade_off for point in points)
    assert points[0] == DialPoint(0.0, 6.0, 1.0, 0.0)
    assert points[-1].layers == 3, "at last every unit is skipped"
    point = points[1]
    taken, divergence = [], []
    for window, _ in items:
        dense, skipping = runtime.session("dense"), runtime.session("token", trade_off=point.trade_off)
        for session in (dense, skipping):
            session.prefill(window[:24])
        for token in window[24:]:
            p = log_softmax(dense.decode_one(int(token))[0])
            logits, actions = skipping.decode_one(int(token))
            divergence.append(float((np.exp(p) * (p - log_softmax(logits))).sum()))
            taken.append(actions)
    skipped = np.array(taken)
    assert 0 < skipped.mean() < 0.5
    assert point.layers == pytest.approx(6 - skipped.sum(axis=1).mean(), abs=0.1)
    saved = skipped[:, [2, 4]].mean(axis=0) @ made.cost.cost
    assert point.time == pytest.approx(1 - saved, abs=0.02)
    assert point.kl == pytest.approx(np.mean(divergence), rel=0.05)


def test_the_dial_is_of_the_answers_that_came_with_the_policy(bundle: Bundle, tiny_model: Checkpoint) -> None:
    """They are a file of the bundle, and gone with another policy."""
    plain = bundle.load_build("cpu-fp32").dial
    messages = [{"role": "user", "content": "Tell me of it."}]
    answers = chats_text((messages, f"It is story {place}, and nobody knows how it ends.") for place in range(20))
    policy = tiny_policy(tiny_model, "linear", units=bundle.manifest.policy.units)
    own = export(tiny_model, bundle.root, replace(policy, answers=answers))
    assert ANSWERS in {record.name for record in own.manifest.files}
    built = build(own, "cpu-fp32")
    runtime = DashRuntime.load(own.root, "cpu-fp32")
    items = dial_table._calibration_items(runtime)
    prompt = runtime.text.chat(messages)
    assert len(items) == 16
    assert all(item.prefix == len(prompt) and item.ids[: len(prompt)].tolist() == prompt for item in items)
    assert built.dial != plain
    (own.root / ANSWERS).write_text("{")
    with pytest.raises(BundleError, match=ANSWERS):
        DashRuntime.load(own.root, "cpu-fp32")
    assert not (export(tiny_model, own.root, policy).root / ANSWERS).exists()


def test_precisions_lie_side_by_side(bundle: Bundle) -> None:
    """Each with costs and a dial of its own; the exported policy is enough for these."""
    key, known = bundle.manifest.key, bundle.load_build("cpu-fp32")
    made = build(bundle, "cpu", weights="int4")
    assert Bundle.open(bundle.root).manifest.key == key
    assert DashRuntime.load(bundle.root, made.target).generate(random_ids(5), 9, skipped=1.5).actions.any()
    assert DashRuntime.load(bundle.root, "cpu-fp32").generate(random_ids(5), 3).tokens.size == 3
    assert sum(record.bytes for record in made.files) < sum(record.bytes for record in known.files)
    assert made.cost != known.cost
    assert made.dial != known.dial


def test_a_bundle_without_a_network_serves_dense_and_static(tiny_model: Checkpoint, tmp_path: Path) -> None:
    plain = export(tiny_model, tmp_path / "plain.dash")
    made = build(plain, "cpu", weights="fp32")
    assert made.dial == ()
    runtime = DashRuntime.load(plain.root, "cpu-fp32")
    unit = plain.manifest.policy.units[0]
    assert runtime.generate(random_ids(8), 6, skip=list(unit.layers)).actions[1:].sum() == 5 * len(unit.layers)


QUIET = """
from dash_export.building import build, cost_table
cost_table.LoadMeter = type("Quiet", (), {"load": lambda _: (0.0, 0.0)})  # whatever else runs here
"""


def test_a_copy_without_graphs_is_measured(bundle: Bundle) -> None:
    """As a device has it, which has no onnx either."""
    before = bundle.load_build("cpu-fp32")
    shutil.rmtree(bundle.path("onnx"))
    with pytest.raises(
        BundleError,
        match=r"without portable graphs .* can be measured here \(--measure\).* Run: dash-export export MODEL -o",
    ):
        build(bundle, "cpu", weights="fp32")
    with pytest.raises(BundleError, match=r"no portable graphs .* to compare"):
        build(bundle, "cpu", weights="fp32", verify=True, measure=True)
    code = (
        "import sys; sys.modules |= dict.fromkeys(('onnx', 'onnx_ir', 'gguf', 'safetensors', 'torch'))\n"
        f"{QUIET}build(sys.argv[1], 'cpu', weights='fp32', measure=True)"
    )
    ran = python(code, bundle.root)
    assert ran.returncode == 0, ran.stderr
    after = Bundle.open(bundle.root).load_build("cpu-fp32")
    assert after.cost.segment_us != before.cost.segment_us
    assert after == replace(before, cost=after.cost, dial=after.dial)
    shown = done("inspect", bundle.root, "--verify")
    assert "The portable graphs are not here" in shown.stdout


def test_it_measures_with_the_recipe_s_threads(bundle: Bundle, tmp_path: Path) -> None:
    """Calibrating is not to start the process's only pool with another number before."""
    (tmp_path / "one.toml").write_text('[weights]\nrounding = "gptq"\nblock_size = 16\n[runtime]\nthreads = 1\n')
    for options in ("", ", verify=True, measure=True"):  # the second time only what verifies runs something before
        code = (
            f"import sys\n{QUIET}build(*sys.argv[1:]{options})\n"
            "from dash_export.backends.onnxruntime.ort_engine import start_thread_pool; print(start_thread_pool(0))"
        )
        ran = python(code, bundle.root, tmp_path / "one.toml")
        assert (ran.stdout.strip(), ran.stderr) == ("1", "")


def test_a_gpu_build_needs_no_onnxruntime(bundle: Bundle) -> None:
    shutil.rmtree(bundle.root / "engines")
    code = (
        "import sys; sys.modules['onnxruntime'] = None\n"
        "from dash_export.building import build; print(build(sys.argv[1], 'cuda').target)"
    )
    ran = python(code, bundle.root)
    assert ran.stdout.strip() == "cuda", ran.stderr


def test_what_could_not_be_measured_is_measured_later(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines are compiled on one machine and built again on the one with the GPU, maybe without graphs."""
    first = build(bundle, "cuda", verify=True)
    assert first.cost.device == NOT_MEASURED
    measured = replace(first.cost, device="a GPU")
    monkeypatch.setattr(CudaBackend, "run_obstacle", lambda _: None)
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "_with_measurements", lambda _b, draft, *_: replace(draft, cost=measured))
        second = build(bundle, "cuda")
        assert second == replace(first, cost=measured)
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "_with_measurements", None)
        assert build(bundle, "cuda") == second
    monkeypatch.setattr(pipeline, "_with_measurements", lambda _b, draft, *_: draft)
    shutil.rmtree(bundle.path("onnx"))
    monkeypatch.setattr("dash_export.building.engine_graphs.artifacts", None)
    assert build(bundle, "cuda", measure=True) == second
