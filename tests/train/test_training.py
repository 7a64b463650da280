import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from dash_export.bundle.policy_file import check_replaceable, load_policy
from dash_export.core.units import parse_units, units_text
from dash_export.errors import CheckpointError, OutputError, PolicyError, RequestError
from dash_export.files import replacing
from dash_export.files.outputs import MARK, work_folder
from dash_export.models import Checkpoint
from dash_export.models.bypasses import check_model
from dash_export.models.spec import FINAL_NORM
from dash_export.text.chats import parsed_chats
from dash_export.train import TrainingSettings, partition, stages, training, work
from dash_export.train.corpus import OWN
from dash_export.train.partition import Candidate, candidate_groups
from dash_export.train.training import check_unique_names, train
from dash_export.train.work import Work
from tests.tiny import TINY_UNITS, tiny_checkpoint
from tests.train.helpers import SETTINGS, Learn, StopError, Trained, card_of, same


def test_the_file_is_the_policy_and_the_card_says_how(trained: Trained, checkpoint: Checkpoint, prose: Path) -> None:
    path, policy = trained
    known = load_policy(path, checkpoint.spec)
    assert same(known, policy), "in half precision, as it is stored"
    check_model(known, checkpoint)
    np.testing.assert_array_equal(known.final_norm, checkpoint.weights[FINAL_NORM].read_rows(0, 64))
    card = card_of(path)
    assert {name: entry["read_as"] for name, entry in card["data"].items()} == {prose.name: "text"}
    assert (card["settings"]["seed"], card["chosen"]) == (0, [])
    assert policy.origin.startswith("token policy for model, trained by dash-export (seed 0, key ")
    rows = {row["setting"]: row for row in card["held_out"]["texts"]["figures"]}
    assert rows["dense"]["kl"] == pytest.approx(0, abs=1e-4)
    assert rows["static, 4, 2-3"]["kl"] > rows["static, 4"]["kl"] > 0
    assert (rows["static, 4"]["skipped"], rows["static, 4, 2-3"]["skipped"]) == (1, 3)
    dial = [row["skipped"] for name, row in rows.items() if name.startswith("token")]
    assert dial == sorted(dial), "a higher trade-off skips more"
    assert dial[0] < dial[-1]
    assert (card["units"], card["static_order"], card["read"]) == ("2-3,4", "4,2-3", 1)
    assert (policy.units, policy.static_order, policy.read) == (TINY_UNITS, (1, 0), 1)
    assert not path.with_name(f"{path.name}.unfinished").exists()


def test_a_short_training_is_short_in_all_its_stages(learn: Learn, output: Path) -> None:
    """So that two steps take a minute; the defaults stay as they are."""
    assert TrainingSettings().shortened() == TrainingSettings()
    asked = TrainingSettings(window=32, tuning_steps=2, trade_offs=(0.5, 8.0), precision="float32")
    learn(settings=asked.shortened())
    short = {"search_every": 8, "windows": 1, "judged_batches": 1, "own_prompts": 8, "own_tokens": 32}
    short |= dict.fromkeys(("search_steps", "fit_steps", "warm_up_steps", "regression_steps"), 2)
    card = card_of(output)
    assert card["settings"] == asdict(replace(asked, **short)) | {"trade_offs": [0.5, 8.0]}
    assert card["held_out"]["texts"]["judged"] < 32
    assert [len(group) for group in candidate_groups(30, every=8)] == [16], "of the layers 5, 13, 21 and 29"


@pytest.mark.parametrize(
    ("change", "bfloat16", "equal"),
    [
        ({"seed": 1}, True, False),
        ({"precision": None}, True, True),
        ({"precision": None}, False, False),
    ],
)
def test_the_same_settings_make_the_same_policy(
    change: dict[str, Any], bfloat16: bool, equal: bool, trained: Trained, learn: Learn, output: Path,
    monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """The precision, where none is asked for, is one that the processor is fast in."""
    monkeypatch.setattr(training, "has_bfloat16", lambda: bfloat16)
    settings = replace(SETTINGS, **change)
    assert same(learn(settings=settings), trained[1]) == equal
    assert card_of(output)["precision"] == (settings.precision or ("bfloat16" if bfloat16 else "float32"))


@pytest.fixture(scope="module")
def searched(checkpoint: Checkpoint, prose: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    path = tmp_path_factory.mktemp("searched") / "policy.safetensors"
    return path, train(checkpoint, path, [prose], settings=SETTINGS)


def test_units_are_those_that_gain_most(searched: Trained, checkpoint: Checkpoint) -> None:
    """Before the tuning, and still after it."""
    path, policy = searched
    card = card_of(path)
    assert {*card["units"].split(",")} <= {row["unit"] for row in card["chosen"]}
    assert card["units"] == ",".join(map(str, policy.units)) == units_text(load_policy(path, checkpoint.spec).units)
    for row in card["chosen"]:
        assert 0 < row["gain"] < row["saved"] < 1
        assert row["damage"] > 0


def two_units(tried: list[Candidate], _layers: int) -> list[Candidate]:
    """In the place of a search, which would choose one of this model."""
    return sorted((one for one in tried if one.unit in TINY_UNITS), key=lambda one: one.unit.first)


def test_units_that_turn_out_not_to_pay_are_left_out(
    learn: Learn, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With their bypasses and their part of the network; units that were asked for stay."""
    last = Mock(side_effect=lambda units, _gains: (len(units) - 1,))
    monkeypatch.setattr(partition, "units_that_pay", last)
    monkeypatch.setattr(partition, "best_partition", two_units)
    policy = learn(units=None)
    units, gains = last.call_args.args
    assert [row["unit"] for row in card_of(output)["chosen"]] == [str(unit) for unit in units] == ["2-3", "4"]
    assert len(gains) == 2
    assert all(0 <= gain < 1 for gain in gains)
    assert policy.units == TINY_UNITS[1:]
    assert len(policy.bypasses) == policy.network["bias"].size == 1  # type: ignore[index]
    assert learn(units=TINY_UNITS).units == TINY_UNITS
    last.assert_called_once()


def killed(learn: Learn, stage: str, times: int = 1, **options: Any) -> list[str]:
    """A training that ends the nth time that it speaks of the stage. Returns of what it spoke."""
    heard: list[str] = []

    def progress(name: str, _done: int, _total: int) -> None:
        heard.append(name)
        if sum(name.startswith(stage) for name in heard) == times:
            raise StopError

    with pytest.raises(StopError):
        learn(**options, progress=progress)
    return heard


FULL = {"candidates": 12, "bypasses": 3, "regression": 6, "tuning": 6, "static": 1}
"""How often a whole training speaks of its stages, where each layer's candidates are a group: 4 and 2 candidates, after
three steps of their sums each.
"""
DONE = dict.fromkeys(FULL, 0)
KILLS = {
    "candidates": (5, FULL | {"candidates": 4 + 3 + 2}),  # the sums and two trials of the first group were kept
    "bypasses": (2, FULL | {"candidates": 0, "bypasses": 2}),
    "regression": (4, DONE | {"regression": 3, "tuning": 6, "static": 1}),
    "tuning": (5, DONE | {"tuning": 2, "static": 1}),
    "static": (1, DONE | {"static": 1}),
    "held-out": (1, DONE),
}
"""Stage -> at which of its mentions a training is killed, and how often the one that goes on mentions each."""


@pytest.mark.parametrize("stage", KILLS)
def test_a_killed_training_goes_on_where_it_stopped(
    stage: str, searched: Trained, learn: Learn, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every stage: what is done is not done again, and the file is the same. Progress is that of the whole."""
    monkeypatch.setattr(work, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(partition, "GROUP", 1)
    (times, left), seen = KILLS[stage], list[tuple[str, int, int]]()
    killed(learn, stage, times, units=None)
    assert not output.exists()
    resumed = learn(units=None, progress=lambda *told: "reading" in told[0] or seen.append(told))
    assert same(resumed, searched[1])
    assert json.loads(output.with_suffix(".json").read_text())["seconds"] is None, "those of one process are not all"
    assert {own: sum(name.startswith(own) for name, _, _ in seen) for own in FULL} == left
    dones, totals = zip(*(told[1:] for told in seen), strict=True)
    assert [*dones] == sorted(dones)
    assert set(totals) == {dones[-1]}


def test_windows_one_after_the_other_make_the_gradient_of_all(
    learn: Learn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the activations of a step do not fit into the memory that it may take."""
    settings = replace(SETTINGS, precision="float32", tuning_steps=3)
    passed, backward = list[int](), torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, "backward", lambda value: (passed.append(1), backward(value))[1])
    whole = learn(settings=settings, output=tmp_path / "whole.safetensors").weights()
    steps = len(passed)
    monkeypatch.setattr("dash_export.train.model.KEPT", 1)
    apart = learn(settings=settings, output=tmp_path / "apart.safetensors").weights()
    assert len(passed) - steps == steps + 3 * settings.tuning_steps, "only in the tuning"
    for name, value in whole.items():
        np.testing.assert_allclose(apart[name].astype(np.float32), value.astype(np.float32), atol=2e-3, err_msg=name)


def test_what_appears_at_the_output_during_a_training_is_kept(trained: Trained, learn: Learn, output: Path) -> None:
    card, heard = output.with_suffix(".json"), list[str]()

    def appear(name: str, *_: object) -> None:
        if name.startswith("tuning"):
            output.write_bytes(b"mine")
            card.write_text("{}")

    with pytest.raises(PolicyError, match="exists and is no skip policy: it will not be overwritten"):
        learn(progress=appear)
    assert (output.read_bytes(), card.read_text()) == (b"mine", "{}")
    output.unlink()
    card.unlink()
    assert same(learn(progress=lambda name, *_: heard.append(name)), trained[1])
    assert not any(name.startswith("tuning") for name in heard), "the work was kept"


@pytest.mark.parametrize("place", ["policy.safetensors", "policy.json"])
def test_a_policy_that_cannot_be_replaced_is_told_before_the_work(
    place: str, trained: Trained, learn: Learn, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mount point; and what the training goes on from."""
    for path in (trained[0], trained[0].with_suffix(".json")):
        shutil.copy(path, output.parent)
    before = output.read_bytes()
    with pytest.raises(OutputError, match="is read, and lies in what is replaced"):
        learn(start=output, units=None)
    mounted = {output.parent.resolve()}
    monkeypatch.setattr(replacing, "_mount_points", lambda: mounted)
    check_replaceable(output)
    mounted.add(output.parent.resolve() / place)
    with pytest.raises(OutputError, match=rf"{place} is a mount point"):
        learn()
    assert output.read_bytes() == before


def test_a_text_that_changes_while_it_is_read(learn: Learn, output: Path, tmp_path: Path, prose: Path) -> None:
    text = Path(shutil.copy(prose, tmp_path / "mine.txt"))

    def change(what: str, *_: int) -> None:
        if what == "reading the text":
            text.write_text(text.read_text() + "More.")

    with pytest.raises(CheckpointError, match=r"mine\.txt changed while it was read"):
        learn(texts=[text], progress=change)
    assert not output.exists()


def test_the_work_folder_holds_nothing_of_others(learn: Learn, output: Path, prose: Path) -> None:
    inside = work_folder(output, "train") / "mine.txt"
    inside.write_text(prose.read_text())
    with pytest.raises(OutputError, match=r"mine\.txt is read, and lies in what is replaced"):
        learn(texts=[inside])
    (inside.parent / MARK).unlink()
    with pytest.raises(OutputError, match="is not this program's"):
        learn()
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


def test_another_reading_is_another_training(checkpoint: Checkpoint, learn: Learn, tmp_path: Path) -> None:
    """In which nothing of the other one's is taken: a file as text and as prompts, a chat template."""
    file = prompts_at(tmp_path / "both.jsonl", 40)
    template = {"chat_template.jinja": "{% for message in messages %}{{ message.content }}{% endfor %}"}
    other = {"model": replace(checkpoint, assets=checkpoint.assets | template)}
    asked = {"texts": [], "prompts": [file]}
    for reading in ({"texts": [file]}, asked, other):
        for steps in (SETTINGS.regression_steps, 0):
            heard = killed(learn, "tuning", **reading)
            assert sum(name.startswith("regression") for name in heard) == steps


def test_a_loss_that_is_no_number_ends_the_training(
    learn: Learn, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it is in every weight, and in the file that the training would go on from."""
    loss = stages.regression_loss
    monkeypatch.setattr(stages, "regression_loss", lambda *given: loss(*given) * float("nan"))
    with pytest.raises(PolicyError, match="loss of step 1 of the regression is not a number"):
        learn()
    assert not list(output.with_name(f"{output.name}.unfinished").glob("regression-*"))


def test_sources_have_names_of_their_own() -> None:
    """A text may be called as the model's own answers are where there are none."""
    check_unique_names([Path("x.txt"), Path(f"{OWN}.txt")])
    check_unique_names([Path("x.txt")], [Path("x.jsonl")])
    for texts, prompts, name in (
        (["a/x.txt", "b/x.md"], [], "x"),
        (["a/x.jsonl"], ["b/x.jsonl"], "x"),
        ([], ["a/x.jsonl", "b/x.jsonl"], "x"),
        ([f"{OWN}.txt"], ["x.jsonl"], OWN),
    ):
        with pytest.raises(RequestError, match=f"would be called {name}"):
            check_unique_names([Path(text) for text in texts], [Path(file) for file in prompts])


def test_a_unit_whose_bypass_is_larger(learn: Learn, tmp_path: Path) -> None:
    small = tiny_checkpoint(tmp_path / "model", intermediate_size=8, num_key_value_heads=4)
    with pytest.raises(PolicyError, match="Skipping 2 saves nothing: its bypass is larger"):
        learn(model=small, units=parse_units("2"))


def prompts_at(path: Path, count: int) -> Path:
    path.write_text("".join(json.dumps({"prompt": f"Tell me of {topic}."}) + "\n" for topic in range(count)))
    return path


def test_static_kind_and_own_answers(learn: Learn, output: Path, tmp_path: Path) -> None:
    """A training that goes on reads the answers that it began with."""
    options = {"kind": "static", "prompts": [prompts_at(tmp_path / "prompts.jsonl", 6)]}
    seen: set[str] = set()
    killed(learn, "bypasses", **options)
    policy = learn(**options, progress=lambda name, *_: seen.add(name.partition(",")[0]))
    assert OWN not in seen
    assert (policy.network, sorted(policy.static_order)) == (None, [0, 1])
    assert card_of(output)["tokens"].keys() == {"prose", OWN}


def test_without_text_and_prompts_it_learns_from_those_that_ship(
    checkpoint: Checkpoint, learn: Learn, output: Path
) -> None:
    """And keeps the held-out answers; a model without a chat template has none."""
    heard: list[str] = []
    policy = learn(texts=[], planned=lambda plan: heard.append(str(plan)), progress=lambda name, *_: heard.append(name))
    assert "GiB of memory" in heard[0], "before the model is read"
    assert card_of(output)["data"].keys() == {"prompts.jsonl"}
    known = load_policy(output, checkpoint.spec)
    assert known.answers == policy.answers
    assert [chat.answer is not None for chat in parsed_chats(known.answers, "answers")] == [True]
    plain = replace(checkpoint, assets={name: text for name, text in checkpoint.assets.items() if "chat" not in name})
    brief = replace(SETTINGS, fit_steps=1, regression_steps=1, tuning_steps=1)
    assert learn(model=plain, texts=[], settings=brief).answers == ""
    assert card_of(output)["data"].keys() == {"quantise.txt"}


def test_a_tokenizer_and_a_template_that_give_up(checkpoint: Checkpoint, learn: Learn, tmp_path: Path) -> None:
    tokenizer = json.loads(checkpoint.assets["tokenizer.json"]) | {"pre_tokenizer": None}
    tokenizer["model"]["unk_token"] = "<missing>"
    prompts = prompts_at(tmp_path / "prompts.jsonl", 6)
    for name, text, said in (
        ("tokenizer.json", json.dumps(tokenizer), "does not read this text"),
        ("chat_template.jinja", "{{ '' }}", "makes nothing of a prompt"),
    ):
        other = replace(checkpoint, assets={**checkpoint.assets, name: text})
        with pytest.raises(RequestError, match=said):
            learn(model=other, prompts=[prompts])


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"kind": "cosine"}, PolicyError, "token, static"),
        ({"texts": [Path("missing.txt")]}, RequestError, "no file"),
        ({"texts": [Path("a/prose.txt"), Path("b/prose.md")]}, RequestError, "called prose"),
        ({"units": parse_units("0-3")}, PolicyError, "Layer 0"),
        ({"settings": replace(SETTINGS, trade_offs=(1e-6, 2e-6))}, PolicyError, "costs more than it saves"),
        ({"settings": replace(SETTINGS, precision="int4")}, PolicyError, "no precision 'int4'"),
        ({"start": Path("smollm2-135m-instruct")}, PolicyError, "a llama of 6 layers"),
        ({"settings": replace(SETTINGS, window=2000)}, PolicyError, "context of this model is"),
    ],
)
def test_what_cannot_be_trained(
    learn: Learn, output: Path, change: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        learn(**{"units": None} | change)
    assert not output.exists()
