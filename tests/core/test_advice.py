"""What is told to who has no policy."""

import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from dash_export import DashRuntime
from dash_export.building.exporting import export
from dash_export.bundle.bundle import Bundle
from dash_export.bundle.suitable import calibration_minutes, suitable_target, target_of_bits
from dash_export.core import advice
from dash_export.core.advice import if_without_policy, policy_command, quick_training
from dash_export.graphs.portable.ggml import BLOCKS
from dash_export.models import open_checkpoint
from dash_export.models.spec import _BITS
from tests.commands.helpers import done
from tests.models.helpers import tiny_model, write_gguf


@pytest.mark.parametrize(
    ("parameters", "minutes", "saved"),
    [(1, 1, 2), (134_515_008, 6, 2), (494_032_768, 20, 4), (1_543_714_304, 60, 4), (8_000_000_000, 312, 4)],
)
def test_minutes_are_in_proportion(parameters: int, minutes: int, saved: int) -> None:
    """Those of int4's calibration grow faster: 35 for 1.5B, 351 for 8B."""
    assert [calibration_minutes(each) for each in (134_515_008, 1_543_714_304, 8_000_000_000)] == [1, 35, 351]
    assert quick_training(parameters) == (
        minutes,
        f"about {saved} % of the decode time for 2 % of perplexity on its own answers",
    )


@pytest.mark.parametrize("source", ["a b/it's.gguf", "org/name-1.5B", "."])
def test_the_command_can_be_pasted(source: str, runtime: DashRuntime) -> None:
    told = policy_command(runtime.engines.model, source)
    words = shlex.split(told.split("): ")[1])
    name = {"a b/it's.gguf": "it's", "org/name-1.5B": "name-1.5B", ".": Path.cwd().name}[source]
    assert words == ["dash-export", "train", source, "-o", f"{name}.safetensors", "--skips", "--effort", "quick"]


def test_a_shipped_policy_is_better_than_training(runtime: DashRuntime) -> None:
    model = replace(runtime.engines.model, name="SmolLM2-135M-Instruct.Q4_1.gguf")
    told = policy_command(model, "my models/SmolLM2-135M-Instruct.Q4_1.gguf")
    command = "dash-export build 'my models/SmolLM2-135M-Instruct.Q4_1.gguf' --policy smollm2-135m-instruct"
    assert told == f"One for this model comes with this package: {command}"
    assert set(advice.shipped_policies()) == {"smollm2-135m-instruct", "qwen2.5-coder-0.5b-instruct"}


def test_only_who_did_not_ask_for_none_is_told(runtime: DashRuntime) -> None:
    manifest = runtime.bundle.manifest
    bare = replace(manifest.policy, has_network=False, static_order=())
    told = if_without_policy(manifest.model, bare)
    assert told.startswith("No token policy: every token runs every layer. Train one (about 1 minutes on 2 cores; ")
    assert told.endswith(": dash-export train MODEL -o NAME.safetensors --skips --effort quick")
    for policy in (
        manifest.policy,
        replace(bare, static_order=(1, 0)),  # trained, static
        replace(bare, units=()),  # pruned, or --units none
    ):
        assert if_without_policy(manifest.model, policy) == ""


@pytest.mark.parametrize(("kind", "target"), [("Q5_0", "cpu-gguf"), ("Q8_0", "cpu")])
def test_the_target_that_suits_a_file(kind: str, target: str, tmp_path: Path) -> None:
    """Which `train` tells without a bundle."""
    write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"), quantize=kind)
    bundle = export(tmp_path / "tiny.gguf", tmp_path / "tiny.dash")
    assert suitable_target(bundle.manifest) == target_of_bits(open_checkpoint(tmp_path / "tiny.gguf").bits) == target


def test_bits_are_those_of_the_blocks_that_graphs_keep() -> None:
    assert {kind: block.bits for kind, block in BLOCKS.items()} | {"F16": 16, "BF16": 16} == _BITS


def test_a_file_of_few_bits_is_built_as_it_is(tmp_path: Path) -> None:
    """Unless the target is given, or what it would be is built already; then what else there is is told."""
    write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"), quantize="Q4_0")
    bundle = tmp_path / "tiny.dash"
    told = done("export", tmp_path / "tiny.gguf", "-o", bundle).stdout
    assert f"Next: dash-export build {bundle} --target cpu-gguf\n" in told
    assert f"Next: dash-export build {bundle} --target cpu-gguf\n" in done("inspect", bundle).stdout
    first = done("build", tmp_path / "tiny.gguf", "-o", bundle)
    assert "--target cpu-gguf, for the model is stored in few bits" in first.stderr
    assert Bundle.open(bundle).targets() == ["cpu-gguf"]
    assert "stored in few bits" not in done("build", bundle).stderr
    asked, again = (done("build", bundle, "--target", "cpu") for _ in range(2))
    assert (
        "Calibrating int4 takes about 1 minutes on 2 cores. The model is stored in few bits: --target" in asked.stderr
    )
    assert "Calibrating" not in again.stderr
    assert "/engines/cpu:" in done("build", bundle).stdout
    assert Bundle.open(bundle).targets() == ["cpu", "cpu-gguf"]
