"""Embeddings in the place of tokens, and final states out."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from dash_export import DashRuntime
from dash_export.building import build
from dash_export.building.exporting import export
from dash_export.errors import ContextLengthError, RequestError
from dash_export.models import open_checkpoint
from dash_export.runtime.results import NO_TOKEN
from tests.tiny import random_ids, save_model

TinyRuntime = Callable[..., DashRuntime]


@pytest.mark.parametrize("target", ["cpu-fp32", "portable"])
def test_ids_and_their_embeddings(target: str, tiny_runtime: TinyRuntime) -> None:
    """The same tokens, logits and states; in one piece, or between tokens, or after an answer."""
    runtime = tiny_runtime(target)
    ids = random_ids(40)
    one, other, mixed = (runtime.session("static", skip=(2, 3)) for _ in range(3))
    embeddings = other.embed(ids)
    assert embeddings.shape == (40, 64)
    expected = one.prefill(ids)
    np.testing.assert_array_equal(other.prefill(embeddings=embeddings), expected)
    np.testing.assert_array_equal(other.hidden, one.hidden)
    mixed.prefill(ids[:7])
    mixed.prefill(embeddings=embeddings[7:31])
    np.testing.assert_allclose(mixed.prefill(ids[31:]), expected, atol=1e-4)
    assert mixed.tokens == [*ids[:7], *[NO_TOKEN] * 24, *ids[31:]]
    answers = [session.generate(ids[:3], 12).tokens for session in (one, other, mixed)]
    np.testing.assert_array_equal(answers[0], answers[1])
    np.testing.assert_array_equal(answers[0], answers[2])
    more = one.prefill(ids[5:9])  # behind the answer's last token, which is not in the cache yet
    np.testing.assert_array_equal(other.prefill(embeddings=embeddings[5:9]), more)


def test_embeddings_and_states_are_those_of_transformers(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Gemma's scale is a part of them; the state is the one after the final norm."""
    folder = tmp_path_factory.mktemp("gemma")
    model = save_model(folder / "model", "gemma2", head_dim=16, tie_word_embeddings=True)
    bundle = export(open_checkpoint(folder / "model"), folder / "a.dash")
    build(bundle, "cpu", weights="fp32")
    session = DashRuntime.load(bundle.root, "cpu-fp32").session()
    ids = random_ids(9)
    logits = session.prefill(ids)
    with torch.no_grad():
        found = model(torch.tensor(ids)[None], output_hidden_states=True)
    np.testing.assert_allclose(session.embed(ids), found.hidden_states[0][0].numpy(), atol=1e-5)
    np.testing.assert_allclose(session.hidden, found.hidden_states[-1][0, -1].numpy(), atol=2e-4)
    np.testing.assert_allclose(logits, found.logits[0, -1].numpy(), atol=2e-3)


def test_states_follow_the_newest_token(tiny_runtime: TinyRuntime) -> None:
    session = tiny_runtime().session()
    with pytest.raises(RequestError, match="no state yet"):
        _ = session.hidden
    ids = random_ids(12)
    for token in ids.tolist():
        session.decode_one(token)
    last = session.hidden
    session.reset()
    with pytest.raises(RequestError, match="no state yet"):
        _ = session.hidden
    session.prefill(ids)
    np.testing.assert_allclose(session.hidden, last, atol=1e-4)
    assert session.hidden is not session.hidden, "a copy: the next step overwrites the runtime's own"


@pytest.mark.parametrize(
    ("given", "wrong"),
    [
        (np.zeros((3, 63)), r"\[n, 64\], n at least 1; got \[3, 63\]"),
        (np.zeros((0, 64)), r"got \[0, 64\]"),
        (np.zeros(64), r"got \[64\]"),
        (np.full((2, 64), np.nan), "must be finite"),
        ("text", "must be finite numbers"),
        (None, "Give ids or embeddings"),
    ],
)
def test_what_are_none(given: object, wrong: str, tiny_runtime: TinyRuntime) -> None:
    session = tiny_runtime().session()
    session.prefill(random_ids(4))
    with pytest.raises(RequestError, match=wrong):
        session.prefill(embeddings=given)  # type: ignore[arg-type]
    assert len(session.tokens) == 4


def test_more_than_the_context_holds(tiny_runtime: TinyRuntime) -> None:
    session = tiny_runtime().session()
    with pytest.raises(ContextLengthError):
        session.prefill(embeddings=np.zeros((513, 64)))
    with pytest.raises(RequestError, match="one of them"):
        session.prefill(random_ids(3), embeddings=np.zeros((3, 64)))
