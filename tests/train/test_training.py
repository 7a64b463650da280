from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dash_export import outputs
from dash_export.decision import parse_units
from dash_export.errors import OutputError, PolicyError, RequestError
from dash_export.models import Checkpoint
from dash_export.models.bypasses import check_model
from dash_export.models.spec import FINAL_NORM
from dash_export.outputs import MARK, work_folder
from dash_export.policy import SkipPolicy, check_replaceable, load_policy, save_policy
from dash_export.train import partition, stages
from dash_export.train.defaults import TrainingSettings
from dash_export.train.stages import Work
from dash_export.train.training import check_unique_names, train
from tests.tiny import TINY_UNITS, tiny_checkpoint, tiny_policy

SETTINGS = TrainingSettings(
    window=32,
    windows=4,
    search_steps=3,
    fit_steps=3,
    warm_up_steps=2,
    regression_steps=6,
    tuning_steps=6,
    trade_offs=(0.5, 8.0),
    own_prompts=4,
    own_tokens=24,
    precision="bfloat16",
)


class StopError(Exception):
    """A kill, as far as the files on disk can tell."""


def same(one: SkipPolicy, other: SkipPolicy) -> bool:
    left, right = one.weights(), other.weights()
    return left.keys() == right.keys() and all(np.array_equal(left[name], right[name]) for name in left)


@pytest.fixture(scope="module")
def trained(checkpoint: Checkpoint, prose: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SkipPolicy]:
    path = tmp_path_factory.mktemp("trained") / "policy.safetensors"
    return path, train(checkpoint, path, [prose], units=TINY_UNITS, settings=SETTINGS)


def test_the_file_is_the_policy_and_the_card_says_how(
    trained: tuple[Path, SkipPolicy], checkpoint: Checkpoint, prose: Path
) -> None:
    path, policy = trained
    known = load_policy(path, checkpoint.spec)
    assert same(known, policy), "in half precision, as it is stored"
    check_model(known, checkpoint)
    np.testing.assert_array_equal(known.final_norm, checkpoint.weights[FINAL_NORM].read_rows(0, 64))
    card = json.loads(path.with_suffix(".json").read_text())
    assert {name: entry["read_as"] for name, entry in card["data"].items()} == {prose.name: "text"}
    assert (card["settings"]["seed"], card["chosen"]) == (0, [])
    assert policy.origin.startswith("token policy for model, trained by dash-export (seed 0, key ")
    rows = {row["setting"]: row for row in card["held_out"]["figures"]}
    assert rows["dense"]["kl"] == pytest.approx(0, abs=1e-4)
    assert rows["static, 4, 2-3"]["kl"] > rows["static, 4"]["kl"] > 0
    assert (rows["static, 4"]["skipped"], rows["static, 4, 2-3"]["skipped"]) == (1, 3)
    dial = [row["skipped"] for name, row in rows.items() if name.startswith("token")]
    assert dial == sorted(dial), "a higher trade-off skips more"
    assert dial[0] < dial[-1]
    assert (card["units"], card["static_order"], card["read"]) == ("2-3,4", "4,2-3", 1)
    assert (policy.units, policy.static_order, policy.read) == (TINY_UNITS, (1, 0), 1)
    assert not path.with_name(f"{path.name}.unfinished").exists()


@pytest.mark.parametrize("change", [{}, {"seed": 1}, {"precision": "float32"}], ids=["same", "seed", "precision"])
def test_the_same_settings_make_the_same_policy(
    change: dict[str, Any], trained: tuple[Path, SkipPolicy], checkpoint: Checkpoint, prose: Path, tmp_path: Path
) -> None:
    path, settings = tmp_path / "again.safetensors", replace(SETTINGS, **change)
    again = train(checkpoint, path, [prose], units=TINY_UNITS, settings=settings)
    assert same(again, trained[1]) == (not change)
    assert json.loads(path.with_suffix(".json").read_text())["precision"] == settings.precision


@pytest.fixture(scope="module")
def searched(checkpoint: Checkpoint, prose: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SkipPolicy]:
    path = tmp_path_factory.mktemp("searched") / "policy.safetensors"
    return path, train(checkpoint, path, [prose], settings=SETTINGS)


def test_units_are_those_that_gain_most(searched: tuple[Path, SkipPolicy], checkpoint: Checkpoint) -> None:
    path, policy = searched
    card = json.loads(path.with_suffix(".json").read_text())
    assert card["units"] == ",".join(row["unit"] for row in card["chosen"])
    assert load_policy(path, checkpoint.spec).units == policy.units
    assert policy.units
    for row in card["chosen"]:
        assert 0 < row["gain"] < row["saved"] < 1
        assert row["damage"] > 0


def kill_at(stage: str, times: int = 1) -> Callable[[str, int, int], None]:
    """A progress that raises StopError the nth time that it hears of the stage."""
    heard = 0

    def progress(name: str, _done: int, _total: int) -> None:
        nonlocal heard
        heard += name.startswith(stage)
        if heard == times:
            raise StopError

    return progress


FULL = {"candidates": 10, "bypasses": 3, "regression": 6, "tuning": 6, "static": 1}
"""How often a whole training speaks of its stages, where each layer's candidates are a group."""
DONE = dict.fromkeys(FULL, 0)


@pytest.mark.parametrize(
    ("stage", "killed_at", "left"),
    [
        ("candidates", 6, FULL | {"candidates": 6}),
        ("bypasses", 2, FULL | {"candidates": 0}),
        ("regression", 4, DONE | {"bypasses": 3, "regression": 4, "tuning": 6, "static": 1}),
        ("tuning", 5, DONE | {"bypasses": 3, "tuning": 2, "static": 1}),
        ("static", 1, DONE | {"bypasses": 3, "static": 1}),
        ("held-out", 1, DONE | {"bypasses": 3}),
    ],
)
def test_a_killed_training_goes_on_where_it_stopped(
    searched: tuple[Path, SkipPolicy],
    checkpoint: Checkpoint,
    prose: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    killed_at: int,
    left: dict[str, int],
) -> None:
    """At every stage: what is done is not done again, and the file is the same. Progress is that of the whole."""
    monkeypatch.setattr(stages, "SAVE_EVERY", 2)
    monkeypatch.setattr(partition, "GROUP", 1)
    output, seen = tmp_path / "policy.safetensors", []
    with pytest.raises(StopError):
        train(checkpoint, output, [prose], settings=SETTINGS, progress=kill_at(stage, killed_at))
    assert not output.exists()
    resumed = train(checkpoint, output, [prose], settings=SETTINGS, progress=lambda *told: seen.append(told))
    assert same(resumed, searched[1])
    assert {own: sum(name.startswith(own) for name, _, _ in seen) for own in FULL} == left
    (_, *dones), (_, *totals) = zip(*(told[1:] for told in seen), strict=True)  # after "reading the text"
    assert dones == sorted(dones)
    assert set(totals) == {dones[-1]}


def test_what_appears_at_the_output_during_a_training_is_kept(
    trained: tuple[Path, SkipPolicy], checkpoint: Checkpoint, prose: Path, tmp_path: Path
) -> None:
    output = tmp_path / "policy.safetensors"

    def appear(name: str, *_: object) -> None:
        if name.startswith("tuning"):
            output.write_bytes(b"mine")
            output.with_suffix(".json").write_text("{}")

    with pytest.raises(PolicyError, match="exists and is no skip policy: it will not be overwritten"):
        train(checkpoint, output, [prose], units=TINY_UNITS, settings=SETTINGS, progress=appear)
    assert (output.read_bytes(), output.with_suffix(".json").read_text()) == (b"mine", "{}")
    for path in (output, output.with_suffix(".json")):
        path.unlink()
    # the work was kept
    again = train(checkpoint, output, [prose], units=TINY_UNITS, settings=SETTINGS, progress=kill_at("tuning"))
    assert same(again, trained[1])


@pytest.mark.parametrize("place", ["policy.safetensors", "policy.json"])
def test_a_policy_that_cannot_be_replaced_is_told_before_the_work(
    place: str,
    trained: tuple[Path, SkipPolicy],
    checkpoint: Checkpoint,
    prose: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A mount point; and what the training goes on from."""
    output = Path(shutil.copy(trained[0], tmp_path))
    shutil.copy(trained[0].with_suffix(".json"), tmp_path)
    before = output.read_bytes()
    with pytest.raises(OutputError, match="is read, and lies in what is replaced"):
        train(checkpoint, output, [prose], start=output, settings=SETTINGS)
    mounted = {tmp_path.resolve()}
    monkeypatch.setattr(outputs, "_mount_points", lambda: mounted)
    check_replaceable(output)
    mounted.add(tmp_path.resolve() / place)
    with pytest.raises(OutputError, match=rf"{place} is a mount point"):
        train(checkpoint, output, [prose], settings=SETTINGS)
    assert output.read_bytes() == before


def test_the_work_folder_holds_nothing_of_others(checkpoint: Checkpoint, prose: Path, tmp_path: Path) -> None:
    output = tmp_path / "policy.safetensors"
    inside = work_folder(output, "train") / "mine.txt"
    inside.write_text(prose.read_text())
    with pytest.raises(OutputError, match=r"mine\.txt is read, and lies in what is replaced"):
        train(checkpoint, output, [inside], settings=SETTINGS)
    (inside.parent / MARK).unlink()
    with pytest.raises(OutputError, match="is not this program's"):
        train(checkpoint, output, [prose], settings=SETTINGS)
    assert [path.name for path in inside.parent.iterdir()] == ["mine.txt"]


def test_a_damaged_state_is_not_believed(tmp_path: Path) -> None:
    """Wherever a byte of it is another, and where it is cut short: torch looks at no checksum."""
    work = Work(tmp_path, "key")
    assert work.once("tuning", lambda: [1, torch.arange(64.0)])[0] == 1
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    damaged = [whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :] for place in range(0, len(whole), 5)]
    for content in (*damaged, b"", b"PK\x03\x04 cut short", bytes(1000), whole[:-1]):
        path.write_bytes(content)
        assert work.kept("tuning") is None
    path.write_bytes(whole)
    assert Work(tmp_path, "other key").kept("tuning") is None
    assert work.once("tuning", lambda: [2])[0] == 1


def regressed_before_a_kill(checkpoint: Checkpoint, output: Path, texts: list[Path], prompts: list[Path]) -> int:
    """Steps of the regression in a training that is killed in the tuning: none where it finds them done."""
    heard: list[str] = []

    def progress(name: str, _done: int, _total: int) -> None:
        heard.append(name)
        if name.startswith("tuning"):
            raise StopError

    with pytest.raises(StopError):
        train(checkpoint, output, texts, prompts, units=TINY_UNITS, settings=SETTINGS, progress=progress)
    return sum(name.startswith("regression") for name in heard)


def test_another_reading_is_another_training(checkpoint: Checkpoint, prose: Path, tmp_path: Path) -> None:
    """In which nothing of the other one's is taken: a file as text and as prompts, a chat template."""
    file, output = prompts_at(tmp_path / "both.jsonl", 40), tmp_path / "policy.safetensors"
    template = {"chat_template.jinja": "{% for message in messages %}{{ message.content }}{% endfor %}"}
    other = replace(checkpoint, assets=checkpoint.assets | template)
    readings = [(checkpoint, [file], []), (checkpoint, [], [file]), (checkpoint, [], [file])]
    readings += [(checkpoint, [prose], []), (other, [prose], []), (other, [prose], [])]
    steps = [regressed_before_a_kill(each, output, texts, prompts) for each, texts, prompts in readings]
    assert steps == [SETTINGS.regression_steps, SETTINGS.regression_steps, 0] * 2


def test_a_loss_that_is_no_number_ends_the_training(
    checkpoint: Checkpoint, prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it is in every weight, and in the file that the training would go on from."""
    loss = stages.regression_loss
    monkeypatch.setattr(stages, "regression_loss", lambda *given: loss(*given) * float("nan"))
    output = tmp_path / "policy.safetensors"
    with pytest.raises(PolicyError, match="loss of step 1 of the regression is not a number"):
        train(checkpoint, output, [prose], units=TINY_UNITS, settings=SETTINGS)
    assert not list(output.with_name(f"{output.name}.unfinished").glob("regression-*"))


def test_sources_have_names_of_their_own() -> None:
    """A text may be called as the model's own answers are where there are none."""
    check_unique_names([Path("x.txt"), Path("self-generated.txt")])
    check_unique_names([Path("x.txt")], [Path("x.jsonl")])
    for texts, prompts in (
        (["a/x.txt", "b/x.md"], []),
        (["a/x.jsonl"], ["b/x.jsonl"]),
        ([], ["a/x.jsonl", "b/x.jsonl"]),
    ):
        with pytest.raises(RequestError, match="would be called x"):
            check_unique_names([Path(text) for text in texts], [Path(file) for file in prompts])
    with pytest.raises(RequestError, match="would be called self-generated"):
        check_unique_names([Path("self-generated.txt")], [Path("x.jsonl")])


def test_no_stage_takes_more_steps_than_the_tuning(checkpoint: Checkpoint, prose: Path, tmp_path: Path) -> None:
    """Or else a trial run would take as long as a training."""
    path = tmp_path / "short.safetensors"
    train(checkpoint, path, [prose], settings=TrainingSettings(window=32, tuning_steps=2, trade_offs=(0.5, 8.0)))
    settings = json.loads(path.with_suffix(".json").read_text())["settings"]
    assert {settings[f"{stage}_steps"] for stage in ("search", "fit", "regression", "tuning")} == {2}


def test_a_unit_whose_bypass_is_larger(prose: Path, tmp_path: Path) -> None:
    small = tiny_checkpoint(tmp_path / "model", intermediate_size=8, num_key_value_heads=4)
    with pytest.raises(PolicyError, match="Skipping 2 saves nothing: its bypass is larger"):
        train(small, tmp_path / "p.safetensors", [prose], units=parse_units("2"), settings=SETTINGS)


def last_kl(path: Path) -> float:
    """KL where both units are skipped."""
    figures = json.loads(path.with_suffix(".json").read_text())["held_out"]["figures"]
    return next(row["kl"] for row in figures if row["setting"] == "static, 4, 2-3")


def test_a_trained_policy_is_tuned_further(
    trained: tuple[Path, SkipPolicy], checkpoint: Checkpoint, prose: Path, tmp_path: Path
) -> None:
    """Units and shapes are those it begins with; only tuning and ranking are done."""
    path, heard = tmp_path / "further.safetensors", set()
    settings = replace(SETTINGS, seed=1, tuning_steps=40, bypass_rate=1e-2)
    heard_by = {"progress": lambda name, *_: heard.add(name.split()[0])}
    further = train(checkpoint, path, [prose], start=trained[0], settings=settings, **heard_by)
    assert heard == {"reading", "further", "static", "held-out"}
    assert (further.units, further.read) == (trained[1].units, trained[1].read)
    assert further.weights().keys() == trained[1].weights().keys()
    card = json.loads(path.with_suffix(".json").read_text())
    assert card["from"]["file"] == "policy.safetensors"
    assert (card["settings"]["regression_steps"], card["settings"]["fit_steps"]) == (0, 0)
    assert card["settings"]["bypass_rate"] == 1e-2 * SETTINGS.again
    assert last_kl(path) < last_kl(trained[0]), "tuning lowers the divergence"


def test_a_static_policy_goes_on_as_one(
    trained: tuple[Path, SkipPolicy], checkpoint: Checkpoint, prose: Path, tmp_path: Path
) -> None:
    static = tmp_path / "static.safetensors"
    policy = train(checkpoint, static, [prose], kind="static", start=trained[0], settings=SETTINGS)
    assert (policy.network, policy.units) == (None, TINY_UNITS)
    with pytest.raises(PolicyError, match="--kind static"):
        train(checkpoint, tmp_path / "no.safetensors", [prose], start=static, settings=SETTINGS)
    bare = tmp_path / "bare.safetensors"
    save_policy(bare, tiny_policy(checkpoint), checkpoint.spec, {})
    with pytest.raises(PolicyError, match=r"bare\.safetensors has a bypass without weights"):
        train(checkpoint, tmp_path / "no.safetensors", [prose], start=bare, settings=SETTINGS)


def prompts_at(path: Path, count: int) -> Path:
    path.write_text("".join(json.dumps({"prompt": f"Tell me of {topic}."}) + "\n" for topic in range(count)))
    return path


def test_static_kind_and_self_generated_text(checkpoint: Checkpoint, prose: Path, tmp_path: Path) -> None:
    """A training that goes on reads the continuations that it began with."""
    prompts, path, seen = prompts_at(tmp_path / "prompts.jsonl", 6), tmp_path / "static.safetensors", set()
    options = {"kind": "static", "units": TINY_UNITS, "settings": SETTINGS}
    with pytest.raises(StopError):
        train(checkpoint, path, [prose], [prompts], **options, progress=kill_at("bypasses"))
    policy = train(checkpoint, path, [prose], [prompts], **options, progress=lambda name, *_: seen.add(name))
    assert "self-generated text" not in seen
    assert policy.network is None
    assert sorted(policy.static_order) == [0, 1]
    assert json.loads(path.with_suffix(".json").read_text())["tokens"].keys() == {"prose", "self-generated"}


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"output": "policy.pt"}, PolicyError, "NAME.safetensors"),
        ({"kind": "cosine"}, PolicyError, "token, static"),
        ({"texts": []}, RequestError, "nothing to learn from"),
        ({"texts": ["missing.txt"]}, RequestError, "no file"),
        ({"texts": ["a/prose.txt", "b/prose.md"]}, RequestError, "called prose"),
        ({"units": ()}, PolicyError, "no unit to learn about"),
        ({"units": parse_units("0-3")}, PolicyError, "Layer 0"),
        ({"units": parse_units("2,4-40")}, PolicyError, r"units 2,4-40 must be of layers 0 to 5"),
        ({"units": parse_units("2-4,4-5")}, PolicyError, "each layer in one"),
        ({"settings": replace(SETTINGS, trade_offs=(1e-6, 2e-6))}, PolicyError, "costs more than it saves"),
        ({"settings": replace(SETTINGS, precision="int4")}, PolicyError, "no precision 'int4'"),
        ({"start": Path("p.safetensors")}, PolicyError, "no policy file"),
        ({"start": Path("smollm2-135m-instruct")}, PolicyError, "a llama of 6 layers"),
        ({"settings": replace(SETTINGS, window=2000)}, PolicyError, "context of this model is"),
    ],
)
def test_what_cannot_be_trained(
    checkpoint: Checkpoint, prose: Path, tmp_path: Path, change: dict, error: type[Exception], said: str
) -> None:
    given = {"output": "policy.safetensors", "texts": [prose]} | change
    output = tmp_path / given.pop("output")
    texts = [Path(text) for text in given.pop("texts")]
    with pytest.raises(error, match=said):
        train(checkpoint, output, texts, **{"settings": SETTINGS} | given)
    assert not output.exists()
