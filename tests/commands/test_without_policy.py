"""Commands on a bundle without a policy: each names the way to one, and what skipping costs without bypasses."""

import json
from pathlib import Path

import numpy as np
import pytest

from dash_export import DashRuntime
from dash_export.building import build
from dash_export.building.exporting import export
from dash_export.core.policy import no_policy
from tests.commands.helpers import ROOT, dash, done, refused
from tests.tiny import TINY_UNITS, tiny_checkpoint

FP32 = ("--target", "cpu-fp32")


@pytest.fixture(scope="module")
def bare_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle without a policy, built for cpu-fp32."""
    root = tmp_path_factory.mktemp("bare")
    checkpoint = tiny_checkpoint(root / "model")
    bundle = export(checkpoint, root / "bare.dash", no_policy(6, TINY_UNITS))
    build(bundle, "cpu", weights="fp32")
    return bundle.root


@pytest.mark.parametrize(
    "options",
    [("--budget", 0.9), ("--policy", "token"), ("--max-kl", 0.1), ("--skipped", 2), ("--trade-off", 1),
     ("--policy", "static"), ("--policy", "static", "--skipped", 2), ("--prompts", "-", "--budget", 0.9)],
)  # fmt: skip
def test_without_a_policy_train_is_named(options: tuple[object, ...], bare_bundle: Path) -> None:
    prompt = () if "--prompts" in options else ("hello",)
    result = dash("run", bare_bundle, *prompt, *FP32, *options, input="a\n")
    assert result.exit_code == 1
    assert result.stderr.strip().endswith(": dash-export train MODEL -o NAME.safetensors --skips --effort quick")


def test_other_commands_name_it_too(bare_bundle: Path, text: Path) -> None:
    train = ": dash-export train MODEL -o NAME.safetensors --skips --effort quick"
    small = ("--limit", 2, "--window", 48, "--prefix", 10, "--text", text)
    assert train in done("eval", bare_bundle, *FP32, *small).stderr
    assert json.loads(done("eval", bare_bundle, *FP32, *small, "--json").stdout)["refused"][0]["label"] == "token"
    assert train in done("inspect", bare_bundle).stdout
    assert train in refused("serve", bare_bundle, *FP32, "--budget", 0.9)


@pytest.mark.parametrize("writable", [True, False])
def test_what_skips_without_bypasses_cost(
    writable: bool, bare_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is measured once, as `score` measures it; each time where it cannot be kept."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    if not writable:
        cache.write_text("no folder")
    asked = ("run", bare_bundle, "hello", *FP32, "--max-tokens", 2, "--skip")
    first, second, other = (done(*asked, skip).stderr for skip in ("2-3", "2-3", "2-4"))
    runtime = DashRuntime.load(bare_bundle, "cpu-fp32")
    windows = runtime.text.windows((ROOT / "calibration/prose.txt").read_text(), 4, 128)
    dense, skipping = (
        np.mean([runtime.score(ids, 32, **how).log_likelihoods[32:] for ids in windows])
        for how in ({}, {"skip": [2, 3]})
    )
    told = f"stands in for the layers 2-3: skipping them makes perplexity {np.exp(dense - skipping):.3g} times as high"
    assert told in first
    assert told in second
    assert "for the layers 2-4:" in other
    assert "dash-export train MODEL" in first
    measured = [report.count("measuring what skipping") for report in (first, second, other)]
    assert measured == ([1, 0, 1] if writable else [1, 1, 1])


def test_bypasses_need_no_warning(tiny_root: Path) -> None:
    assert "bypass" not in done("run", tiny_root, "hello", *FP32, "--skip", "2-3", "--max-tokens", 2).stderr
