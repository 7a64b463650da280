"""`train`: the command line around the library, which tests/policy tests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dash_export.models import open_checkpoint
from dash_export.policy_file import load_policy
from tests.commands.helpers import dash, refused

QUICK = ("--rank", 4, "--window", 32, "--windows", 2, "--steps", 2, "--regression-steps", 2)


@pytest.fixture(scope="module")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "prose.txt"
    path.write_text(" ".join(f"The {index} ships sailed to port {index * 7 % 31}." for index in range(800)))
    return path


def test_train_and_go_on(model: Path, prose: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    said = dash("train", model, "-o", first, "--text", prose, "--gated", "2-4", "--trade-offs", 0.2, 0.9, *QUICK)
    assert said.exit_code == 0, said.output
    card = json.loads(first.with_suffix(".json").read_text())
    assert f"Held-out text, {card['held_out']['judged']} tokens" in said.output
    assert (card["gated"], card["settings"]["trade_offs"]) == ([2, 3, 4], [0.2, 0.9])
    further = ("train", model, "-o", second, "--text", prose, "--from", first, "--steps", 2, "--window", 32)
    assert "knows nothing about skipping layers 5." in refused(*further, "--gated", "2,5")
    assert "a compensation of rank 4, which can become wider, not narrower" in refused(*further, "--rank", 2)
    said = dash(*further, "--gated", "2,4")
    assert said.exit_code == 0, said.output
    card = json.loads(second.with_suffix(".json").read_text())
    assert (card["from"]["file"], card["gated"]) == (first.name, [2, 4])
    before, after = (load_policy(path, open_checkpoint(model).spec) for path in (first, second))
    said = dash(*further, "--decide", "each", "--width", 3, "--regression-steps", 2)
    assert said.exit_code == 0, said.output
    assert load_policy(second, open_checkpoint(model).spec).width == 3
    assert after.cosine_order == tuple(layer for layer in before.cosine_order if layer != 3)
    assert sorted(after.static_order) == [2, 4]


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--width", 8, "--compensation", "none"), 2, "no --compensation"),
        ((), 1, "no policy file"),
        (("--regression-steps", 8), 2, "--from without --decide takes no --regression-steps"),
        (("--width", 8), 2, "--from without --decide takes no --width"),
        (("--trade-offs", 0, 1), 2, "0"),
        (("--trade-offs", 0.2, "inf"), 1, "from a low to a higher, finite one"),
        (("--trade-offs", 0.2, "nan"), 1, "from a low to a higher, finite one"),
        (("--seed", 1 << 63), 2, "--seed"),
        (("--trade-offs", 0.9, 0.2), 1, "from a low to a higher"),
    ],
)
def test_what_does_not_go_together(
    model: Path, prose: Path, tmp_path: Path, options: tuple[object, ...], code: int, said: str
) -> None:
    output = tmp_path / "p.safetensors"
    message = refused("train", model, "-o", output, "--text", prose, "--from", tmp_path / "none", *options, code=code)
    assert said in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--kind", "static", "--width", 8), 2, "static trains no --width"),
        (("--kind", "static", "--trade-offs", 0.2, 0.9), 2, "no --trade-offs"),
        (("--kind", "static", "--decide", "once"), 2, "static trains no --decide"),
        (("--decide", "once", "--width", 8), 1, "Only a linear network"),
        (("--kind", "static", "--compensation", "none", "--steps", 8), 2, "without a compensation tunes no --steps"),
        (("--compensation", "none", "--rank", 8), 2, "none has no --rank"),
        (("--compensation", "scale", "--rank", 8), 2, "scale has no --rank"),
        (("--rank", 1000), 1, "a higher rank than that adds nothing"),
        (("--precision", "int4"), 2, "bfloat16"),
        (("--device", "abacus"), 1, "no device 'abacus'"),
        (("--device", "cuda:99"), 1, "no device 'cuda:99'"),
    ],
)
def test_options_that_would_do_nothing(
    model: Path, prose: Path, tmp_path: Path, options: tuple[object, ...], code: int, said: str
) -> None:
    assert said in refused("train", model, "-o", tmp_path / "p.safetensors", "--text", prose, *options, code=code)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("option", "content", "said"),
    [
        ("--text", "", "has 0 tokens: too short to train on"),
        ("--text", "A few words.", "too short to train on"),
        ("--prompts", "", "has no prompts"),
        ("--prompts", "{}", "line 1: not a prompt"),
    ],
)
def test_nothing_to_learn_from(model: Path, tmp_path: Path, option: str, content: str, said: str) -> None:
    given = tmp_path / "given.jsonl"
    given.write_text(content)
    assert said in refused("train", model, "-o", tmp_path / "p.safetensors", option, given, *QUICK)
    assert list(tmp_path.iterdir()) == [given]
