from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from dash_export.models import Checkpoint
from dash_export.text.chats import Chat
from dash_export.text.tokenizer import Text
from dash_export.train import own_answers, work
from dash_export.train.corpus import Corpus
from dash_export.train.model import GatedModel
from dash_export.train.own_answers import Answer, Row, answers
from dash_export.train.stages import Run
from dash_export.train.training import model_text
from dash_export.train.work import Work
from tests.train.helpers import SETTINGS, StopError

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [20], [5, 9]]
ROWS = [Row(prompt, (3, place), greedy=place % 2 == 0) for place, prompt in enumerate(PROMPTS)]


def alone(model: GatedModel, row: Row, tokens: int) -> list[int]:
    """The slow way: the whole text again for every token."""
    ids = [*row.prompt]
    for place in range(tokens):
        logits = model.model(torch.tensor([ids])).logits[:, -1].float()
        ids += own_answers.chosen_tokens(logits, [row], [place])
    return ids[len(row.prompt) :]


def test_a_row_of_a_batch_gets_what_it_gets_alone(model: GatedModel) -> None:
    made = answers(model.model, model.spec, ROWS, 12, frozenset())
    assert made == [alone(model, row, 12) for row in ROWS]


def test_rows_that_have_ended_leave_the_batch(model: GatedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the others go on as they would."""
    whole = answers(model.model, model.spec, ROWS, 12, frozenset())
    ends = frozenset({whole[0][2], whole[1][4]})
    rows, step = list[int](), own_answers._step

    def counted(*given: Any) -> torch.Tensor:
        rows.append(len(given[2]))
        return step(*given)

    monkeypatch.setattr(own_answers, "_step", counted)
    made = answers(model.model, model.spec, ROWS, 12, ends)
    assert rows[0] == 4 > rows[-1]
    for answer, known in zip(made, whole, strict=True):
        end = next((place + 1 for place, token in enumerate(known) if token in ends), 12)
        assert answer == known[:end]


@pytest.fixture
def text(checkpoint: Checkpoint) -> Text:
    return model_text(checkpoint)


CHATS = [Chat([{"role": "user", "content": word}]) for word in ("one", "two", "six", "ten")]
CHATS[1] = CHATS[1]._replace(later=("and then?",))


def run(model: GatedModel, folder: Path) -> Run:
    folder.mkdir(exist_ok=True)
    return Run(model, Corpus(), SETTINGS, Work(folder, "key"))


def same(one: Sequence[Answer], other: Sequence[Answer]) -> bool:
    return [answer.passage.ids.tolist() for answer in one] == [answer.passage.ids.tolist() for answer in other]


def test_later_turns_follow_on_the_models_own_answers(model: GatedModel, text: Text, tmp_path: Path) -> None:
    training, held = own_answers.own_answers(run(model, tmp_path), text, CHATS)
    assert len(training) + len(held) == 5
    assert held, "something to judge on"
    second = next(answer for answer in (*training, *held) if len(answer.messages) == 3)
    first = next(answer for answer in (*training, *held) if answer.messages == CHATS[1].messages)
    assert [message["role"] for message in second.messages] == ["user", "assistant", "user"]
    assert second.messages[1]["content"] == first.text
    assert first.text == text.decode(first.passage.ids[first.passage.prefix :].tolist())


def test_a_kill_loses_a_few_tokens(
    model: GatedModel, text: Text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "SAVE_SECONDS", 0.0)
    whole = own_answers.own_answers(run(model, tmp_path / "whole"), text, CHATS)
    steps, step = 0, own_answers._step

    def killed(*given: Any) -> torch.Tensor:
        nonlocal steps
        steps += 1
        if steps == 13:
            raise StopError
        return step(*given)

    monkeypatch.setattr(own_answers, "_step", killed)
    with pytest.raises(StopError):
        own_answers.own_answers(run(model, tmp_path / "killed"), text, CHATS)
    again = own_answers.own_answers(run(model, tmp_path / "killed"), text, CHATS)
    assert all(same(*parts) for parts in zip(whole, again, strict=True))
    assert steps < 13 + 24 - 10 + 24 + 2, "ten tokens of the first batch were not made again"
