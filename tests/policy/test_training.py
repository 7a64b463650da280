from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dash_export.errors import OutputError, PolicyError, RequestError
from dash_export.models import Checkpoint
from dash_export.models.spec import FINAL_NORM
from dash_export.outputs import MARK, work_folder
from dash_export.policy import training as training_module
from dash_export.policy.regression import Regression
from dash_export.policy.settings import TrainingSettings
from dash_export.policy.train import told_apart, train
from dash_export.policy_file import load_policy, save_policy
from dash_export.skip_policy import Compensation, SkipPolicy, check_model

SETTINGS = TrainingSettings(
    window=32,
    windows=4,
    rank=4,
    fit_steps=3,
    warm_up_steps=2,
    regression_steps=6,
    tuning_steps=6,
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
    return path, train(checkpoint, path, [prose], settings=SETTINGS)


def test_the_file_is_the_policy_and_the_card_says_how(
    trained: tuple[Path, SkipPolicy], checkpoint: Checkpoint, prose: Path
) -> None:
    path, policy = trained
    known = load_policy(path, checkpoint.spec)
    assert same(known, policy)
    check_model(known, checkpoint)
    np.testing.assert_array_equal(known.final_norm, checkpoint.weights[FINAL_NORM].read_rows(0, 64))
    card = json.loads(path.with_suffix(".json").read_text())
    assert card["data"].keys() == {prose.name}
    assert card["settings"]["seed"] == 0
    assert policy.origin.startswith("token policy for model, trained by dash-export (seed 0, key ")
    settings = {row["setting"]: row for row in card["held_out"]["figures"]}
    assert settings["dense"]["kl"] == pytest.approx(0, abs=1e-4)
    assert settings["random, 2 layers"]["kl"] > 0
    dial = [row["skipped"] for name, row in settings.items() if name.startswith("token")]
    assert dial == sorted(dial), "a higher trade-off skips more"
    assert dial[0] < dial[-1]
    assert sorted(policy.static_order) == sorted(policy.cosine_order) == list(policy.gated)
    assert not path.with_name(f"{path.name}.unfinished").exists()


def test_a_seed_makes_the_same_policy(
    trained: tuple[Path, SkipPolicy], checkpoint: Checkpoint, prose: Path, tmp_path: Path
) -> None:
    again = train(checkpoint, tmp_path / "again.safetensors", [prose], settings=SETTINGS)
    other = train(checkpoint, tmp_path / "other.safetensors", [prose], settings=replace(SETTINGS, seed=1))
    assert same(again, trained[1])
    assert not same(other, trained[1])


def test_precision(trained: tuple[Path, SkipPolicy], checkpoint: Checkpoint, prose: Path, tmp_path: Path) -> None:
    path = tmp_path / "full.safetensors"
    full = train(checkpoint, path, [prose], settings=replace(SETTINGS, precision="float32"))
    cards = [json.loads(each.with_suffix(".json").read_text()) for each in (trained[0], path)]
    assert [card["precision"] for card in cards] == ["bfloat16", "float32"]
    assert not same(full, trained[1])
    with pytest.raises(PolicyError, match="no precision 'int4'"):
        train(checkpoint, path, [prose], settings=replace(SETTINGS, precision="int4"))


@pytest.mark.parametrize("stage", ["regression", "tuning"])
def test_a_killed_training_goes_on_where_it_stopped(
    trained: tuple[Path, SkipPolicy],
    checkpoint: Checkpoint,
    prose: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
) -> None:
    monkeypatch.setattr(training_module, "SAVE_EVERY", 2)
    output = tmp_path / "policy.safetensors"

    def kill(name: str, _done: int, _total: int) -> None:
        if name.startswith(f"{stage} 5/"):
            raise StopError

    with pytest.raises(StopError):
        train(checkpoint, output, [prose], settings=SETTINGS, progress=kill)
    assert not output.exists()
    steps: list[str] = []
    resumed = train(
        checkpoint, output, [prose], settings=SETTINGS, progress=lambda name, *_: steps.append(name.split(",")[0])
    )
    assert f"{stage} 4/6" not in steps
    assert f"{stage} 5/6" in steps
    assert same(resumed, trained[1])


def test_what_appears_at_the_output_during_a_training_is_kept(
    trained: tuple[Path, SkipPolicy], checkpoint: Checkpoint, prose: Path, tmp_path: Path
) -> None:
    output = tmp_path / "policy.safetensors"

    def appear(name: str, *_: object) -> None:
        if name.startswith("tuning 5/"):
            output.write_bytes(b"mine")
            output.with_suffix(".json").write_text("{}")

    with pytest.raises(PolicyError, match="exists and is no skip policy: it will not be overwritten"):
        train(checkpoint, output, [prose], settings=SETTINGS, progress=appear)
    assert (output.read_bytes(), output.with_suffix(".json").read_text()) == (b"mine", "{}")
    output.unlink()
    output.with_suffix(".json").unlink()
    steps: list[str] = []
    kept = train(checkpoint, output, [prose], settings=SETTINGS, progress=lambda name, *_: steps.append(name))
    assert same(kept, trained[1])
    assert not [name for name in steps if name.startswith("regression 1/")], "the work was kept"


def test_a_text_inside_the_work_folder(checkpoint: Checkpoint, prose: Path, tmp_path: Path) -> None:
    output = tmp_path / "policy.safetensors"
    inside = work_folder(output) / "mine.txt"
    inside.write_text(prose.read_text())
    with pytest.raises(OutputError, match=r"mine\.txt is read, and lies in what is replaced"):
        train(checkpoint, output, [inside], settings=SETTINGS)
    assert inside.is_file()


def test_a_state_that_is_cut_short_begins_its_stage_anew(
    trained: tuple[Path, SkipPolicy], checkpoint: Checkpoint, prose: Path, tmp_path: Path
) -> None:
    output = tmp_path / "policy.safetensors"
    folder = output.with_name(f"{output.name}.unfinished")
    folder.mkdir()
    (folder / MARK).touch()
    (folder / "regression-state.pt").write_bytes(b"PK\x03\x04 cut short")
    (folder / "tuning-state.pt").write_bytes(bytes(1000))  # what a power cut may leave
    assert same(train(checkpoint, output, [prose], settings=SETTINGS), trained[1])


def test_continuations_that_are_cut_short_are_made_anew(checkpoint: Checkpoint, prose: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Tell me of {topic}."}) + "\n" for topic in "abcdef"))
    output = tmp_path / "policy.safetensors"

    def kill(name: str, _done: int, _total: int) -> None:
        if name.startswith("compensation"):
            raise StopError

    def continuations() -> Path:
        (kept,) = output.with_name(f"{output.name}.unfinished").glob("*-own-words.npz")
        return kept

    for damage in (lambda whole: whole[: len(whole) // 2], lambda whole: b"\x80\x04." + whole):
        with pytest.raises(StopError):
            train(checkpoint, output, [prose], [prompts], settings=SETTINGS, progress=kill)
        whole = continuations().read_bytes()
        continuations().write_bytes(damage(whole))
        with pytest.raises(StopError):
            train(checkpoint, output, [prose], [prompts], settings=SETTINGS, progress=kill)
        assert continuations().read_bytes() == whole


def test_a_work_folder_of_somebody_else_is_kept(checkpoint: Checkpoint, prose: Path, tmp_path: Path) -> None:
    folder = tmp_path / "policy.safetensors.unfinished"
    folder.mkdir()
    (folder / "thesis.tex").write_text("mine")
    with pytest.raises(OutputError, match="is not this program's"):
        train(checkpoint, tmp_path / "policy.safetensors", [prose], settings=SETTINGS)
    assert [path.name for path in folder.iterdir()] == ["thesis.tex"]


def test_a_loss_that_is_no_number_ends_the_training(
    checkpoint: Checkpoint, prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it is in every weight, and in the file that the training would go on from."""
    loss = Regression.loss
    monkeypatch.setattr(Regression, "loss", lambda self, *given: loss(self, *given) * float("nan"))
    output = tmp_path / "policy.safetensors"
    with pytest.raises(PolicyError, match="loss of step 1 of the regression is not a number"):
        train(checkpoint, output, [prose], settings=SETTINGS)
    assert not list(output.with_name(f"{output.name}.unfinished").glob("regression-*"))


@pytest.mark.parametrize(
    ("texts", "prompts", "name"),
    [
        (["a/x.txt", "b/x.md"], [], "x"),
        (["a/x.jsonl"], ["b/x.jsonl"], "x.jsonl"),
        ([], ["a/x.jsonl", "b/x.jsonl"], "x.jsonl"),
        (["own words.txt"], ["x.jsonl"], "own words"),
    ],
)
def test_sources_are_told_apart(texts: list[str], prompts: list[str], name: str) -> None:
    with pytest.raises(RequestError, match=f"would be called {name}:"):
        told_apart([Path(text) for text in texts], [Path(file) for file in prompts])


def test_a_text_may_be_called_as_a_prompt_file() -> None:
    told_apart([Path("x.txt"), Path("own words.txt")])
    told_apart([Path("x.txt")], [Path("x.jsonl")])


def test_a_state_that_fits_in_part_leaves_nothing_of_itself(
    trained: tuple[Path, SkipPolicy],
    checkpoint: Checkpoint,
    prose: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Weights that are ours and an optimizer's state that is not: the stage begins with the weights it began with."""
    monkeypatch.setattr(training_module, "SAVE_EVERY", 2)
    output = tmp_path / "policy.safetensors"

    def kill(name: str, _done: int, _total: int) -> None:
        if name.startswith("regression 5/"):
            raise StopError

    with pytest.raises(StopError):
        train(checkpoint, output, [prose], settings=SETTINGS, progress=kill)
    path = output.with_name(f"{output.name}.unfinished") / "regression-state.pt"
    state = torch.load(path, weights_only=True)
    state["optimizer"]["param_groups"] = []
    torch.save(state, path)
    assert same(train(checkpoint, output, [prose], settings=SETTINGS), trained[1])


def test_tuning_lowers_the_divergence(
    trained: tuple[Path, SkipPolicy], checkpoint: Checkpoint, prose: Path, tmp_path: Path
) -> None:
    longer = train(
        checkpoint,
        tmp_path / "longer.safetensors",
        [prose],
        settings=replace(SETTINGS, tuning_steps=60, compensation_rate=5e-3),
    )
    figures = [
        {row["setting"]: row["kl"] for row in json.loads(path.read_text())["held_out"]["figures"]}
        for path in (trained[0].with_suffix(".json"), tmp_path / "longer.json")
    ]
    assert longer.compensation.kind == "low_rank"
    assert figures[1]["random, 2 layers"] < figures[0]["random, 2 layers"]


def test_a_trained_policy_is_tuned_further(
    trained: tuple[Path, SkipPolicy], checkpoint: Checkpoint, prose: Path, tmp_path: Path
) -> None:
    """Layers, shapes and cosine order are those it begins with; only tuning and ranking are done."""
    path, stages = tmp_path / "further.safetensors", set()
    further = train(
        checkpoint,
        path,
        [prose],
        start=trained[0],
        settings=replace(SETTINGS, seed=1, rank=0, width=3, tuning_steps=40, compensation_rate=1e-2),
        progress=lambda name, *_: stages.add(name.split()[0]),
    )
    assert stages == {"reading", "further", "each", "static", "held-out"}
    assert (further.gated, further.cosine_order) == (trained[1].gated, trained[1].cosine_order)
    shapes = [{name: array.shape for name, array in policy.weights().items()} for policy in (trained[1], further)]
    assert shapes[0] == shapes[1]
    cards = [json.loads(file.with_suffix(".json").read_text()) for file in (trained[0], path)]
    assert cards[1]["from"]["file"] == "policy.safetensors"
    assert (cards[1]["settings"]["rank"], cards[1]["settings"]["regression_steps"]) == (4, 0)
    assert cards[1]["settings"]["compensation_rate"] == 1e-2 * SETTINGS.again
    before, after = (
        {row["setting"]: row["kl"] for row in card["held_out"]["figures"]}["random, 2 layers"] for card in cards
    )
    assert after < before


def test_a_compensation_is_widened(
    trained: tuple[Path, SkipPolicy], checkpoint: Checkpoint, prose: Path, tmp_path: Path
) -> None:
    """Its first columns are those it had, where nothing is tuned after; the network stays."""
    path, stages = tmp_path / "wide.safetensors", set()
    settings = replace(SETTINGS, rank=7, compensation_rate=0.0, refinement_rate=0.0)
    wide = train(
        checkpoint,
        path,
        [prose],
        start=trained[0],
        settings=settings,
        progress=lambda name, *_: stages.add(name.split()[0]),
    )
    assert stages == {"reading", "compensation", "further", "each", "static", "held-out"}
    known, weights = trained[1].compensation.weights, wide.compensation.weights
    assert weights["up"].shape == (len(wide.gated), 7, checkpoint.spec.hidden_size)
    np.testing.assert_array_equal(weights["down"][:, :, :4], known["down"])
    np.testing.assert_array_equal(weights["up"][:, :4], known["up"])
    assert np.abs(weights["down"][:, :, 4:]).max() > 0
    assert same(replace(wide, compensation=trained[1].compensation, origin=trained[1].origin), trained[1])
    assert json.loads(path.with_suffix(".json").read_text())["settings"]["rank"] == 7
    assert same(load_policy(path, checkpoint.spec), wide), "what is returned is what is stored"
    for array in weights.values():
        np.testing.assert_array_equal(array, array.astype(np.float16))
    with pytest.raises(PolicyError, match="rank 7, which can become wider, not narrower"):
        train(checkpoint, tmp_path / "p.safetensors", [prose], start=path, settings=SETTINGS)


def test_another_way_to_decide_is_learnt_anew(
    trained: tuple[Path, SkipPolicy], checkpoint: Checkpoint, prose: Path, tmp_path: Path
) -> None:
    """The compensation stays, the network is fitted anew and both are tuned; going on from there keeps the way."""
    path, stages = tmp_path / "once.safetensors", set()
    once = train(
        checkpoint,
        path,
        [prose],
        start=trained[0],
        settings=replace(SETTINGS, decide="once", compensation_rate=0.0),
        progress=lambda name, *_: stages.add(name.split()[0]),
    )
    assert stages == {"reading", "regression", "further", "each", "static", "held-out"}
    assert once.decision_points == {once.gated[0] - 1: once.gated}
    for name, array in trained[1].compensation.weights.items():
        np.testing.assert_array_equal(once.compensation.weights[name], array)
    card = json.loads(path.with_suffix(".json").read_text())
    assert (card["settings"]["decide"], card["settings"]["refinement_rate"]) == ("once", SETTINGS.refinement_rate)
    kept = train(checkpoint, tmp_path / "kept.safetensors", [prose], start=path, settings=SETTINGS)
    assert kept.reads == once.reads
    card = json.loads((tmp_path / "kept.json").read_text())
    assert (card["settings"]["decide"], card["settings"]["regression_steps"]) == ("once", 0)


def test_without_a_compensation_the_network_is_tuned(checkpoint: Checkpoint, prose: Path, tmp_path: Path) -> None:
    bare = replace(SETTINGS, rank=0, compensation="none")
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    one = train(checkpoint, first, [prose], settings=replace(bare, tuning_steps=1))
    other = train(checkpoint, second, [prose], settings=bare)
    assert other.weights().keys() == {"network.state", "network.bias"}
    assert not same(one, other)
    assert not same(train(checkpoint, second, [prose], start=first, settings=bare), one), "and goes on from there"


def test_a_static_policy_goes_on_as_one(
    trained: tuple[Path, SkipPolicy], checkpoint: Checkpoint, prose: Path, tmp_path: Path
) -> None:
    static = tmp_path / "static.safetensors"
    policy = train(checkpoint, static, [prose], kind="static", start=trained[0], settings=SETTINGS)
    assert policy.network is None
    assert policy.cosine_order == trained[1].cosine_order
    with pytest.raises(PolicyError, match="--kind static"):
        train(checkpoint, tmp_path / "no.safetensors", [prose], start=static, settings=SETTINGS)
    bare = tmp_path / "bare.safetensors"
    save_policy(bare, replace(trained[1], compensation=Compensation()), checkpoint.spec, {})
    with pytest.raises(PolicyError, match="nothing to tune"):
        train(checkpoint, tmp_path / "no.safetensors", [prose], kind="static", start=bare, settings=SETTINGS)
    scale = Compensation("scale", {"factor": np.ones(len(trained[1].gated), np.float32)})
    save_policy(bare, replace(trained[1], compensation=scale), checkpoint.spec, {})
    with pytest.raises(PolicyError, match="not low-rank: it takes no --rank"):
        train(checkpoint, tmp_path / "no.safetensors", [prose], start=bare, settings=SETTINGS)


def test_static_kind_and_own_words(checkpoint: Checkpoint, prose: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Tell me of {topic}."}) + "\n" for topic in "abcdef"))
    path = tmp_path / "static.safetensors"
    policy = train(checkpoint, path, [prose], [prompts], kind="static", settings=SETTINGS)
    assert policy.network is None
    assert len(policy.static_order) == len(policy.gated)
    assert json.loads(path.with_suffix(".json").read_text())["tokens"].keys() == {"prose", "own words"}


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"output": "policy.pt"}, PolicyError, "NAME.safetensors"),
        ({"kind": "cosine"}, PolicyError, "token, static"),
        ({"texts": []}, RequestError, "nothing to learn from"),
        ({"texts": ["missing.txt"]}, RequestError, "no file"),
        ({"texts": ["a/prose.txt", "b/prose.md"]}, RequestError, "called prose"),
        ({"texts": [], "prompts": [Path("a/p.jsonl"), Path("b/p.jsonl")]}, RequestError, r"called p\.jsonl"),
        ({"gated": (0, 3)}, PolicyError, "Layer 0"),
        ({"gated": (40,)}, PolicyError, "do not exist"),
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
