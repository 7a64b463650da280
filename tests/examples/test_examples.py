"""Every script of examples/ runs on a tiny bundle."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.commands.helpers import done
from tests.tiny import tiny_bundle
from tests.tiny_encoder import encoder_bundle

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("examples"), "cpu", form="linear")


def printed(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("embed", ["--tokens", "5"], "layers a token"),
        ("stream", ["--trade-off", "1e6"], "3 layers"),
        ("several", [], "'My dear friend': "),
        ("embeddings", [], "for a head of your own: (64,)"),
        ("compare_budgets", ["1.0", "--tokens", "5"], "budget 1.0: 6.0 layers"),
    ],
)
def test_scripts(
    name: str,
    arguments: list[str],
    expected: str,
    bundle: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert expected in printed(name, capsys, monkeypatch, str(bundle), *arguments, "--target", "cpu-fp32")


def test_own_model(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [str(bundle.parent / "model"), str(tmp_path / "own.dash"), "--weights", "fp32"]
    assert "built as cpu-fp32; perplexity" in printed("own_model", capsys, monkeypatch, *arguments)


def test_own_policy(bundle: Path, tmp_path: Path) -> None:
    """In `run`, beside the token policy in `eval`, and as a skip map."""
    policy, target = f"{EXAMPLES / 'own_policy.py'}:EveryOther", ("--target", "cpu-fp32")
    text = tmp_path / "own.txt"
    text.write_text("Some layers of a decoder are hardly needed. " * 30)
    done("run", bundle, *target, "--policy", policy, "--max-tokens", 9, "Some layers")
    small = ("--window", 48, "--prefix", 10, "--limit", 2)
    found = done("eval", bundle, *target, "--kinds", f"token,{policy}", "--skipped", "1", "--text", text, *small)
    assert "own_policy.py:EveryOther" in found.output


def test_camera(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    root = encoder_bundle(tmp_path)
    (tmp_path / "frames").mkdir()
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 256, (50, 42, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "frames" / f"{number}.png")
    out = printed("camera", capsys, monkeypatch, str(root), str(tmp_path / "frames"), "--target", "portable")
    assert [line.partition(" layers")[0] for line in out.splitlines()[:4]] == [f"{number}: 5" for number in range(1, 5)]
    assert "4 frames in" in out
    assert " ms" in printed("camera", capsys, monkeypatch, str(root), str(tmp_path / "frames"), "--frames", "1")
    with pytest.raises(SystemExit, match=r"cannot be opened|pip install opencv-python-headless"):
        printed("camera", capsys, monkeypatch, str(root), str(tmp_path / "none"))


def test_build_on_ray(own_bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two nodes, of which one has the target `portable`; what cannot be built is told beside the others."""
    ray = pytest.importorskip("ray", reason="pip install ray")
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.add_node(num_cpus=1, resources={"portable": 1})
    try:
        targets = ("portable", "nothing", "--address", cluster.address, "--cores", "1")
        out = printed("build_on_ray", capsys, monkeypatch, str(own_bundle), *targets)
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert "portable: " in out
    assert " engines in " in out
    assert "nothing: " in out
