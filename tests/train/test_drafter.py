"""A drafter's layer in training, its text, and its training, of tiny random models."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dash_export.bundle.policy_file import load_policy, save_policy
from dash_export.core.policy import SkipPolicy
from dash_export.errors import PolicyError, RequestError
from dash_export.models import Checkpoint
from dash_export.text.tokenizer import Text
from dash_export.train import DrafterSettings, drafter, drafter_training, own_text, work
from dash_export.train.draft_figures import calibrated, judged
from dash_export.train.draft_layer import DraftLayer
from dash_export.train.drafter import head_rows, padded_batch, short_vocabularies
from dash_export.train.drafter_training import train_drafter
from dash_export.train.model import GatedModel
from dash_export.train.own_answers import Row, answers
from dash_export.train.own_text import Written, read_windows, written
from dash_export.train.training import model_text
from dash_export.train.work import Work
from tests.graphs.test_families import CASES
from tests.tiny import random_ids, tiny_checkpoint, tiny_policy
from tests.train.helpers import StopError, card_of

SETTINGS = DrafterSettings(
    tokens=1200, rows=8, prompt_tokens=8, answer_tokens=40, epochs=8, vocabulary=200, compared=150, batch_tokens=300,
    held_out=0.15, warm_up_steps=4, layer_rate=2e-3, map_rate=2e-3, precision="float32",
)  # fmt: skip
CPU = torch.device("cpu")


class Given(nn.Module):
    """In the place of a map: what it is to return, whatever it is given."""

    def __init__(self, rows: torch.Tensor) -> None:
        super().__init__()
        self.rows, self.first = rows, 0

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        self.first += 1
        return self.rows[:, self.first : self.first + given.shape[1]]


@pytest.mark.parametrize("case", CASES)
def test_the_layer_is_the_models_last_one(case: str, tmp_path: Path) -> None:
    """Given the true inputs of the last layer, it returns the true states, at every depth, but for its own K and V:
    those equal the cache's here.
    """
    family, options = CASES[case]
    gated = GatedModel(tiny_checkpoint(tmp_path / "model", family, **options), CPU, torch.float32)
    texts = read_windows(gated, [random_ids(length, seed=length) for length in (40, 25)])
    before = next(before for index, before, _ in gated.dense_layers(padded_batch(texts, CPU).ids) if index == 5)
    batch, layer = padded_batch(texts, CPU), DraftLayer(gated)
    layer.state = Given(before)  # type: ignore[assignment]
    nn.init.zeros_(layer.embedding.weight)
    for depth, states in enumerate(layer.chain(batch.ids, batch.states, batch.keys, batch.values, 3), 1):
        counted = batch.weight[:, depth:] > 0
        torch.testing.assert_close(states[counted], batch.states[:, depth:][counted], atol=2e-4, rtol=1e-3)


def test_a_text_has_the_states_of_one_pass(model: GatedModel) -> None:
    """Also where rows of other lengths were beside it, and have left."""
    rows = [Row([5, 6, 7, 9, 3], (1,), False), Row([8], (2,), False), Row([20, 4], (3,), True)]
    plain = answers(model.model, model.spec, rows, 20, frozenset())
    ends = frozenset({plain[0][3]})
    for row, text in zip(rows, written(model, rows, 20, ends), strict=True):
        made = text.ids[text.start :].tolist()
        assert text.ids[: text.start].tolist() == list(row.prompt)
        assert made == answers(model.model, model.spec, [row], 20, ends)[0][: len(made)]
        (read,) = read_windows(model, [text.ids.numpy()])
        for name in ("states", "keys", "values"):
            torch.testing.assert_close(getattr(text, name), getattr(read, name), atol=1e-4, rtol=1e-3)


def test_a_repeated_answer_ends() -> None:
    assert own_text._repeats([1, *range(12), 5, *range(12)])
    assert not own_text._repeats([*range(12), 5, *range(11)])
    assert own_text._repeats([7] * 13)


@pytest.fixture(scope="module")
def texts(checkpoint: Checkpoint, model: GatedModel) -> list[Written]:
    text = model_text(checkpoint)
    return [each for number in range(3) for each in own_text.own_text(model, text, SETTINGS, number)]


def test_own_text_goes_through_the_template(checkpoint: Checkpoint, texts: list[Written]) -> None:
    tokenizer = model_text(checkpoint).tokenizer
    for text in texts:
        prompt = tokenizer.decode(text.ids[: text.start].tolist(), skip_special_tokens=False)
        assert prompt.startswith("<|im_start|>user\n")
        assert prompt.endswith("<|im_end|>\n<|im_start|>assistant\n")


@pytest.fixture(scope="module")
def head_and_tokens(model: GatedModel, texts: list[Written]) -> tuple[Any, torch.Tensor]:
    tokens, fewer = short_vocabularies(model, texts, (200, 50))
    assert (tokens.diff() > 0).all()
    assert {*fewer.tolist()} < {*tokens.tolist()}
    return head_rows(model.head, tokens), tokens


def fit(model: GatedModel, texts: list[Written], folder: Path, head: Any, **options: Any) -> DraftLayer:
    folder.mkdir(exist_ok=True)
    return drafter.fitted(model, head, texts, replace(SETTINGS, **options), Work(folder, "key"), lambda *_: None)


def test_training_learns_what_it_is_shown(
    model: GatedModel, texts: list[Written], head_and_tokens: tuple[Any, torch.Tensor], tmp_path: Path
) -> None:
    head, tokens = head_and_tokens
    first = fit(model, texts, tmp_path / "first", head, epochs=0)
    before = judged(first, head, tokens, texts, 3, 300)
    after = judged(fit(model, texts, tmp_path / "last", head, epochs=25), head, tokens, texts, 3, 300)
    assert after.accepted[0] > before.accepted[0] + 0.1
    assert after.accepted[0] >= after.accepted[1] >= after.accepted[2]
    assert after.covered == before.covered > 0.5
    assert after.tokens == sum(len(text.ids) - 1 - text.start for text in texts)


def test_a_killed_training_gives_the_same(
    model: GatedModel,
    texts: list[Written],
    head_and_tokens: tuple[Any, torch.Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(work, "SAVE_SECONDS", 0.0)
    head, _ = head_and_tokens
    whole = fit(model, texts, tmp_path / "whole", head, epochs=2)

    def stop(_name: str, done: int, _total: int) -> None:
        if done == 3:
            raise StopError

    (tmp_path / "cut").mkdir()
    with pytest.raises(StopError):
        drafter.fitted(model, head, texts, replace(SETTINGS, epochs=2), Work(tmp_path / "cut", "key"), stop)
    again = fit(model, texts, tmp_path / "cut", head, epochs=2)
    for name, value in whole.weights().items():
        np.testing.assert_array_equal(again.weights()[name], value, err_msg=name)


def test_calibration() -> None:
    chances = torch.rand(4000, generator=torch.manual_seed(0), dtype=torch.float64)
    right = (torch.rand(4000, dtype=torch.float64) < torch.sigmoid(0.5 * torch.logit(chances) - 0.7)).double()
    slope, offset = calibrated(chances, right)
    assert abs(slope - 0.5) < 0.08
    assert abs(offset + 0.7) < 0.12


Train = Callable[..., SkipPolicy]


@pytest.fixture
def learn(checkpoint: Checkpoint, output: Path) -> Train:
    return lambda **options: train_drafter(checkpoint, output, **{"settings": SETTINGS} | options)


def test_a_policy_file_with_a_drafter(learn: Train, checkpoint: Checkpoint, output: Path, prose: Path) -> None:
    plans = list[Any]()
    policy = learn(planned=plans.append, texts=[prose])
    loaded, card = load_policy(output, checkpoint.spec), card_of(output)
    assert loaded.drafter is not None
    assert policy.drafter is not None
    for name, value in policy.drafter.weights.items():
        np.testing.assert_allclose(loaded.drafter.weights[name], value, atol=2e-3, err_msg=name)
    assert (loaded.drafter.slope, loaded.drafter.offset) == (card["held_out"]["slope"], card["held_out"]["offset"])
    assert card["held_out"]["tokens"] > 0
    assert card["tokens"] > SETTINGS.tokens
    assert str(plans[0]).startswith("about 1 minutes")
    assert not list(output.parent.glob("*.unfinished"))


def test_a_drafter_joins_skips(learn: Train, checkpoint: Checkpoint, output: Path) -> None:
    """And a policy of another model is refused before the work."""
    start, policy = output.with_name("skips.safetensors"), tiny_policy(checkpoint, "linear")
    final_norm = checkpoint.read("model.norm.weight")
    save_policy(start, replace(policy, final_norm=final_norm), checkpoint.spec, {})
    learn(start=start)
    made = load_policy(output, checkpoint.spec)
    assert made.units == policy.units
    assert made.drafter is not None
    start.with_suffix(".json").unlink()
    save_policy(start, replace(policy, final_norm=2 * final_norm[::-1].copy()), checkpoint.spec, {})
    with pytest.raises(PolicyError, match="policy of another model"):
        learn(start=start)


def test_a_killed_run_keeps_its_text(learn: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers, write = list[int](), own_text.own_text

    def stopped(gated: GatedModel, text: Text, settings: DrafterSettings, number: int, *rest: Any) -> list[Written]:
        numbers.append(number)
        if numbers == [0, 1, 2]:
            raise StopError
        return write(gated, text, settings, number, *rest)

    monkeypatch.setattr(drafter_training, "own_text", stopped)
    with pytest.raises(StopError):
        learn()
    learn()
    assert numbers[2:4] == [2, 2], "the texts before are there"


def test_a_model_without_a_template_continues(tmp_path: Path, output: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "model")
    checkpoint = replace(checkpoint, assets={k: v for k, v in checkpoint.assets.items() if k != "chat_template.jinja"})
    assert train_drafter(checkpoint, output, settings=SETTINGS).drafter is not None


def test_what_cannot_serve(checkpoint: Checkpoint, learn: Train, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("too short")
    with pytest.raises(RequestError, match="too short"):
        learn(texts=[short])
    with pytest.raises(RequestError, match="There is no file"):
        learn(texts=[tmp_path / "none.txt"])
    deaf = replace(checkpoint, assets={**checkpoint.assets, "chat_template.jinja": "hello"})
    with pytest.raises(RequestError, match="changes what a user says"):
        train_drafter(deaf, tmp_path / "o.safetensors", settings=SETTINGS)
