from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dash_export.errors import RequestError
from dash_export.train.corpus import Corpus, Passage, read_corpus, read_prompts
from tests.models.helpers import tiny_tokenizer


def test_prose_is_dense_for_a_prefix_and_counted_after_it() -> None:
    corpus = Corpus({"prose": [Passage(np.arange(500))]})
    batch = corpus.batch(np.random.default_rng(0), 32, 64)
    prefixes = batch.dense.sum(axis=1)
    assert (batch.dense ^ batch.counted).all()
    assert (np.diff(batch.dense.astype(int), axis=1) <= 0).all()
    assert prefixes.min() == 2
    assert prefixes.max() > 8
    assert (np.diff(batch.ids, axis=1) == 1).all()


def test_a_prompt_is_dense_and_padding_does_not_count() -> None:
    corpus = Corpus({"chat": [Passage(np.arange(1, 31), prefix=20)]})
    batch = corpus.batch(np.random.default_rng(0), 2, 64)
    assert batch.dense[0].sum() == 20
    np.testing.assert_array_equal(np.flatnonzero(batch.counted[0]), np.arange(20, 30))


def test_a_long_prompt_keeps_its_end() -> None:
    corpus = Corpus({"chat": [Passage(np.arange(100), prefix=80)]})
    batch = corpus.batch(np.random.default_rng(0), 1, 32)
    assert batch.ids[0, 0] == 64
    assert batch.dense[0].sum() == 16


def test_small_sources_are_drawn_as_often_as_large_ones() -> None:
    corpus = Corpus({"large": [Passage(np.zeros(10_000, np.int64))], "small": [Passage(np.ones(100, np.int64))]})
    drawn = corpus.batch(np.random.default_rng(0), 400, 16).ids[:, 0].mean()
    assert 0.4 < drawn < 0.6


def test_the_end_of_a_text_is_held_out(prose: Path) -> None:
    training, held = read_corpus([prose], tiny_tokenizer(), 32, 0.1)
    ids = tiny_tokenizer().encode(prose.read_text(), add_special_tokens=False).ids
    (first,), (last,) = training.sources["prose"], held.sources["prose"]
    assert [*first.ids, *last.ids] == ids
    assert len(last.ids) == pytest.approx(0.1 * len(ids), abs=1)


@pytest.mark.parametrize(
    ("content", "said"), [(b"too short", "too short"), (b"\xff\xfe\x00", "not UTF-8"), (None, "no text file")]
)
def test_a_text_that_cannot_serve(tmp_path: Path, content: bytes | None, said: str) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RequestError, match=said):
        read_corpus([path], tiny_tokenizer(), 32, 0.1)


def test_prompts_in_all_their_forms(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        '{"prompt": "a"}\n\n{"turns": ["b", "c"]}\r\n{"messages": [{"role": "user", "content": "d\u2028"}]}\n'
    )
    assert [messages[0]["content"] for messages in read_prompts(path)] == ["a", "b", "d\u2028"]


@pytest.mark.parametrize("line", ["{", "[]", "3", '{"turns": []}', '{"prompt": 4}', '{"messages": [{"role": "user"}]}'])
def test_a_line_that_is_no_prompt_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n' + line + "\n")
    with pytest.raises(RequestError, match="line 2: not a prompt"):
        read_prompts(path)
