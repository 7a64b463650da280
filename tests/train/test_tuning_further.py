"""Trainings that go on from a policy."""

from dataclasses import replace
from pathlib import Path

import pytest

from dash_export.bundle.policy_file import load_policy, save_policy
from dash_export.core.units import parse_units
from dash_export.errors import PolicyError
from dash_export.models import Checkpoint
from dash_export.train.stages import Run
from tests.tiny import TINY_UNITS, tiny_policy
from tests.train.helpers import SETTINGS, Learn, Trained, card_of


def last_kl(path: Path) -> float:
    """KL where both units are skipped."""
    figures = card_of(path)["held_out"]["texts"]["figures"]
    return next(row["kl"] for row in figures if row["setting"] == "static, 4, 2-3")


def test_a_trained_policy_is_tuned_further(trained: Trained, learn: Learn, tmp_path: Path) -> None:
    """Units and shapes are those it begins with; only tuning and ranking are done."""
    path, heard = tmp_path / "further.safetensors", set()
    settings = replace(SETTINGS, seed=1, tuning_steps=40, bypass_rate=1e-2)
    options = {"units": None, "start": trained[0], "settings": settings}
    further = learn(output=path, **options, progress=lambda name, *_: heard.add(name.split()[0]))
    assert heard == {"reading", "further", "static", "held-out"}
    assert (further.units, further.read) == (trained[1].units, trained[1].read)
    assert further.weights().keys() == trained[1].weights().keys()
    card = card_of(path)
    assert card["from"]["file"] == "policy.safetensors"
    assert (card["settings"]["regression_steps"], card["settings"]["fit_steps"]) == (0, 0)
    assert card["settings"]["bypass_rate"] == 1e-2 * SETTINGS.again
    assert last_kl(path) < last_kl(trained[0]), "tuning lowers the divergence"


def test_answers_are_kept_where_none_are_made(
    trained: Trained, checkpoint: Checkpoint, learn: Learn, output: Path, tmp_path: Path
) -> None:
    """So that a build sets its dial on them, not on prose, after a training for text alone."""
    start, answers = tmp_path / "start.safetensors", '{"prompt": "Why?", "answer": "Because."}\n'
    save_policy(start, replace(trained[1], answers=answers), checkpoint.spec, {})
    settings = replace(SETTINGS, tuning_steps=1)
    assert learn(start=start, units=None, settings=settings).answers == answers
    assert load_policy(output, checkpoint.spec).answers == answers


def test_it_sees_other_batches_than_the_trainings_before(
    trained: Trained, learn: Learn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn, batch = set[str](), Run.batch
    monkeypatch.setattr(Run, "batch", lambda run, stage, step: (drawn.add(stage), batch(run, stage, step))[1])
    settings = replace(SETTINGS, tuning_steps=1)
    once = learn(output=tmp_path / "once.safetensors", units=None, start=trained[0], settings=settings)
    learn(output=tmp_path / "twice.safetensors", units=None, start=tmp_path / "once.safetensors", settings=settings)
    tunings = {stage for stage in drawn if "tuning" in stage}
    assert tunings == {f"further tuning{trained[1].origin}", f"further tuning{once.origin}"}
    assert len(tunings) == 2


def test_a_static_policy_goes_on_as_one(
    trained: Trained, checkpoint: Checkpoint, learn: Learn, output: Path, tmp_path: Path
) -> None:
    policy = learn(kind="static", start=trained[0], units=None)
    assert (policy.network, policy.units) == (None, TINY_UNITS)
    static = output.rename(tmp_path / "static.safetensors")
    with pytest.raises(PolicyError, match="--kind static"):
        learn(start=static, units=None)
    bare = tmp_path / "bare.safetensors"
    save_policy(bare, tiny_policy(checkpoint), checkpoint.spec, {})
    with pytest.raises(PolicyError, match="2-3,4: others are trained from nothing"):
        learn(start=trained[0], units=parse_units("2-4"))
    with pytest.raises(PolicyError, match=r"bare\.safetensors has a bypass without weights"):
        learn(start=bare, units=None)
