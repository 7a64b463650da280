from pathlib import Path

import numpy as np
import pytest
import torch

from dash_export.errors import RequestError
from dash_export.models import Checkpoint
from dash_export.text.tokenizer import Text
from dash_export.train import corpus
from dash_export.train.corpus import Corpus, Passage, read_corpus
from dash_export.train.training import model_text
from tests.models.helpers import tiny_tokenizer


@pytest.fixture
def text(checkpoint: Checkpoint) -> Text:
    return model_text(checkpoint)


def test_prose_is_dense_for_a_prefix_and_counted_after_it() -> None:
    corpus = Corpus({"prose": [Passage(torch.arange(100, 600), beginning=(7,))]})
    ids, dense, counted = (part.numpy() for part in corpus.batch(np.random.default_rng(0), 32, 64))
    prefixes = dense.sum(axis=1)
    assert (dense ^ counted).all()
    assert (np.diff(dense.astype(int), axis=1) <= 0).all()
    assert prefixes.min() == 2
    assert prefixes.max() > 8
    assert (ids[:, 0] == 7).all(), "as a fresh text begins"
    assert (np.diff(ids[:, 1:], axis=1) == 1).all()
    assert (ids[:, 1:] >= 100).all()


@pytest.mark.parametrize(
    ("length", "prompt", "kept", "prefix", "last"),
    [(30, 20, [*range(30)], 20, 30), (100, 80, [*range(4), *range(68, 96)], 16, 32)],
)
def test_a_prompt_is_dense(length: int, prompt: int, kept: list[int], prefix: int, last: int) -> None:
    """Of a long one the beginning and the end are kept; padding does not count."""
    corpus = Corpus({"chat": [Passage(torch.arange(length), prompt)]})
    ids, dense, counted = (part[0] for part in corpus.batch(np.random.default_rng(0), 1, 64 if length < 64 else 32))
    assert (ids[: len(kept)].tolist(), dense.sum()) == (kept, prefix)
    np.testing.assert_array_equal(np.flatnonzero(counted), np.arange(prefix, last))


def test_half_of_the_windows_are_own_answers() -> None:
    """Of the others each source is drawn equally often, however large."""
    names = enumerate((corpus.OWN, "a", "b", "c"))
    sources = {name: [Passage(torch.full((100 * 9**place,), place))] for place, name in names}
    counts = np.bincount(Corpus(sources).batch(np.random.default_rng(0), 600, 16).ids[:, 0])
    np.testing.assert_allclose(counts / 600, [1 / 2, 1 / 6, 1 / 6, 1 / 6], atol=0.05)
    assert not Corpus({corpus.OWN: sources[corpus.OWN]}).batch(np.random.default_rng(0), 4, 16).ids.any()


def test_frequent_tokens() -> None:
    """Those of the text, then those of the lowest ids."""
    found = Corpus({"a": [Passage(torch.tensor([9, 9, 9, 5, 5, 7]))]})
    assert found.frequent(20, 2).tolist() == [5, 9]
    assert found.frequent(20, 5).tolist() == [0, 1, 5, 7, 9]


def test_the_end_of_a_text_is_held_out(prose: Path, text: Text) -> None:
    training, held = read_corpus([prose], text, 32, 0.1)
    ids = tiny_tokenizer().encode(prose.read_text(), add_special_tokens=False).ids
    (first,), (last,) = training.sources["prose"], held.sources["prose"]
    assert [*first.ids, *last.ids] == ids
    assert len(last.ids) == pytest.approx(0.1 * len(ids), abs=1)


def test_the_beginning_is_that_of_the_model(prose: Path, text: Text, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Text, "beginning", np.array([7]))
    for part in read_corpus([prose], text, 32, 0.1):
        assert (part.batch(np.random.default_rng(0), 4, 32).ids[:, 0] == 7).all()


def test_a_window_that_holds_no_text(prose: Path, text: Text) -> None:
    with pytest.raises(RequestError, match="holds no text"):
        read_corpus([prose], text, 3, 0.1)


@pytest.mark.parametrize(
    ("content", "said"), [(b"too short", "too short"), (b"\xff\xfe\x00", "not UTF-8"), (None, "no text file")]
)
def test_a_text_that_cannot_serve(tmp_path: Path, text: Text, content: bytes | None, said: str) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RequestError, match=said):
        read_corpus([path], text, 32, 0.1)
