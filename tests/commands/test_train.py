"""`train`: the command line around the library, which tests/train tests."""

import json
from pathlib import Path

import pytest

from dash_export.bundle.policy_file import load_policy
from dash_export.core.units import Unit, parse_units
from dash_export.models import open_checkpoint
from dash_export.train import DRAFTER_EFFORTS
from tests.commands.helpers import dash, done, refused

QUICK = ("--window", 32, "--steps", 2, "--skips")


def test_train_and_go_on(model: Path, prose: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    said = done("train", model, "-o", first, "--text", prose, "--units", "2-3,4", "--trade-offs", 0.2, 0.9, *QUICK)
    card = json.loads(first.with_suffix(".json").read_text())
    assert f"Held out: texts, {card['held_out']['texts']['judged']} tokens" in said.output
    assert f"Next: dash-export build {model} --policy {first} --target cpu\n" in said.output
    assert (card["units"], card["settings"]["trade_offs"]) == ("2-3,4", [0.2, 0.9])
    said = done("train", model, "-o", second, "--text", prose, "--from", first, *QUICK)
    assert json.loads(second.with_suffix(".json").read_text())["from"]["file"] == first.name
    message = refused("train", model, "-o", second, "--text", prose, "--from", first, "--units", "3-4", *QUICK)
    assert "has the units 2-3,4: others are trained from nothing" in " ".join(message.split())
    fewer = tmp_path / "fewer.safetensors"
    done("train", model, "-o", fewer, "--text", prose, "--from", first, "--units", "4", *QUICK)
    (tmp_path / "latest.safetensors").symlink_to(second)
    said = dash("train", model, "-o", tmp_path / "latest.safetensors", "--text", prose, "--from", first, *QUICK)
    assert said.exit_code == 0, "the card lies where the link leads"
    policies = [load_policy(path, open_checkpoint(model).spec) for path in (first, second)]
    assert policies[0].units == policies[1].units == (Unit(2, 3), Unit(4, 4))
    assert load_policy(fewer, open_checkpoint(model).spec).units == (Unit(4, 4),)


def test_the_units_that_were_found_are_shown(model: Path, prose: Path, tmp_path: Path) -> None:
    output = tmp_path / "p.safetensors"
    said = done("train", model, "-o", output, "--text", prose, "--trade-offs", 0.5, 8, *QUICK)
    assert "Units, by what skipping each alone costs" in said.output
    (row, *_) = json.loads(output.with_suffix(".json").read_text())["chosen"]
    (unit,) = parse_units(row["unit"])
    cells = (row["unit"], len(unit.layers), f"{row['damage']:.4f}", f"{row['saved']:.1%}", f"{row['gain']:.1%}")
    assert list(map(str, cells)) in [line.split() for line in said.output.splitlines()]


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--from", "none", "--kind", "static", "--trade-offs", 0.2, 0.9), 2, "of given units takes no --trade-offs"),
        (("--from", "none"), 1, "no policy file"),
        (("--trade-offs", 0, 1), 2, "0"),
        (("--trade-offs", 0.2, "inf"), 1, "from a low to a higher, finite one"),
        (("--trade-offs", 0.2, "nan"), 1, "from a low to a higher, finite one"),
        (("--trade-offs", 0.9, 0.2), 1, "from a low to a higher"),
        (("--seed", 1 << 63), 2, "--seed"),
        (("--units", "2-3,x"), 2, "Units are written like 5-7,8-10,13; '2-3,x' is not"),
        (("--units", "none"), 1, "no unit to learn about"),
        (("--precision", "int4"), 2, "bfloat16"),
        (("--device", "abacus"), 1, "no device 'abacus'"),
        (("--device", "cuda:99"), 1, "no device 'cuda:99'"),
    ],
)
def test_what_cannot_be_trained(
    model: Path, prose: Path, tmp_path: Path, options: tuple[object, ...], code: int, said: str
) -> None:
    message = refused("train", model, "-o", tmp_path / "p.safetensors", "--skips", "--text", prose, *options, code=code)
    assert said in " ".join(message.split())
    assert not list(tmp_path.iterdir())


def test_nothing_to_learn_from(model: Path, tmp_path: Path) -> None:
    given = tmp_path / "given.jsonl"
    for option, content, said in (
        ("--text", "", "has 0 tokens: too short to train on"),
        ("--text", "A few words.", "too short to train on"),
        ("--prompts", "", "has no prompts"),
        ("--prompts", "{}", "line 1: not a prompt"),
    ):
        given.write_text(content)
        assert said in refused("train", model, "-o", tmp_path / "p.safetensors", option, given, *QUICK)
    assert list(tmp_path.iterdir()) == [given]


def test_a_drafter_by_default(model: Path, prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = {"tokens": 400, "rows": 8, "prompt_tokens": 8, "answer_tokens": 24, "epochs": 1, "vocabulary": 200}
    monkeypatch.setitem(DRAFTER_EFFORTS, "quick", few | {"held_out": 0.2})
    output = tmp_path / "p.safetensors"
    said = done("train", model, "-o", output, "--text", prose, "--seed", 1, "--precision", "float32")
    card = json.loads(output.with_suffix(".json").read_text())
    assert (card["kind"], card["settings"]["seed"], card["settings"]["precision"]) == ("drafter", 1, "float32")
    assert f"{card['held_out']['tokens']} tokens of answers" in said.output
    assert f"Next: dash-export build {model} --policy {output} --target cpu\n" in said.output
    assert load_policy(output, open_checkpoint(model).spec).drafter is not None
    for options in (("--kind", "token"), ("--units", "2-3"), ("--effort", "default"), ("--trade-offs", 0.2, 0.9)):
        message = refused("train", model, "-o", output, *options, code=2)
        assert f"{options[0]}" in message
        assert "give --skips, too" in " ".join(message.split())
