"""SentencePiece vocabularies of GGUF files, against a plain reading of SentencePiece's own rule."""

import json
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, trainers

from dash_export.errors import CheckpointError
from dash_export.models import open_checkpoint
from dash_export.models.readers.tokenizer_gguf import tokenizer_assets
from tests.models.helpers import tiny_model, write_gguf

SPACE = "\u2581"
TEXT = (Path(__file__).parents[2] / "data" / "heldout.txt").read_text(encoding="utf-8")[:60_000]
TEXTS = (
    "The layers of a decoder are not equally needed.",
    "  two  spaces,\n\nlines\tand tabs ",
    "naïve 漢字 🙂 déjà-vu",
    "x",
    " ",
    "",
    "<s>",
    "one<|mark|>two <|mark|> three",
)


@pytest.fixture(scope="module")
def metadata() -> dict[str, Any]:
    """A vocabulary of 700 pieces as a converter writes it: scores fall in the order of the merges, pieces have none."""
    trained = Tokenizer(models.BPE())
    words = TEXT.replace(" ", f" {SPACE}").split(" ")
    trained.train_from_iterator(words, trainers.BpeTrainer(vocab_size=440, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    merged = ["".join(merge) for merge in model["merges"]]
    letters = [piece for piece in model["vocab"] if piece not in set(merged)]
    special = [("<unk>", 2), ("<s>", 3), ("</s>", 3), ("<|mark|>", 4)]
    tokens = [*special, *((f"<0x{byte:02X}>", 6) for byte in range(256)), *((piece, 1) for piece in merged + letters)]
    scores = [0.0] * (4 + 256) + [-float(place) for place in range(len(merged) + len(letters))]
    order = [*range(260), *random.Random(1).sample(range(260, len(tokens)), len(tokens) - 260)]  # no merge's order
    tokens, scores = [tokens[place] for place in order], [scores[place] for place in order]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [token for token, _ in tokens],
        "tokenizer.ggml.token_type": [kind for _, kind in tokens],
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def pieces(text: str, known: dict[str, tuple[int, float]]) -> list[int]:
    """SentencePiece's rule, slowly: join the neighbours of the best score, the first of these, until none can be."""
    parts = list(text)
    while True:
        joint = [(known[one + two][1], -at) for at, (one, two) in enumerate(pairwise(parts))
                 if one + two in known]  # fmt: skip
        if not joint:
            break
        at = -max(joint)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    ids = []
    for part in parts:
        ids += [known[part][0]] if part in known else [4 + byte for byte in part.encode()]
    return ids


@pytest.mark.parametrize("prefix", [True, False])
def test_as_sentencepiece_cuts_it(metadata: dict[str, Any], prefix: bool) -> None:
    given = metadata | {"tokenizer.ggml.add_space_prefix": prefix}
    tokens, kinds, scores = (metadata[f"tokenizer.ggml.{name}"] for name in ("tokens", "token_type", "scores"))
    known = {token: (place, scores[place]) for place, token in enumerate(tokens) if kinds[place] == 1}
    assets = tokenizer_assets(given, 1000)
    tokenizer = Tokenizer.from_str(assets["tokenizer.json"])
    rng = random.Random(0)
    cuts = [rng.randrange(len(TEXT) - 300) for _ in range(40)]
    for text in (*TEXTS[:6], *(TEXT[cut : cut + rng.randrange(1, 300)] for cut in cuts)):
        expected = pieces((SPACE if prefix and text else "") + text.replace(" ", SPACE), known)
        found = tokenizer.encode(text).ids
        assert found == [1, *expected], text
        assert tokenizer.decode(found[1:]) == text
    assert json.loads(assets["tokenizer_config.json"])["add_bos_token"] is True


def test_special_tokens(metadata: dict[str, Any]) -> None:
    tokenizer = Tokenizer.from_str(tokenizer_assets(metadata, 1000)["tokenizer.json"])
    assert tokenizer.encode("<s>").ids == [1, 1]
    assert tokenizer.encode("one<|mark|>two", add_special_tokens=False).ids.count(3) == 1
    assert tokenizer.decode([3]) == "<|mark|>"
    assert tokenizer.encode("one<unk>two", add_special_tokens=False).ids.count(0) == 1
    assert tokenizer.decode([0]) == ""
    without = metadata | {"tokenizer.ggml.add_bos_token": False}
    assert Tokenizer.from_str(tokenizer_assets(without, 1000)["tokenizer.json"]).encode("").ids == []


def test_old_files_name_neither_beginning_nor_end(metadata: dict[str, Any]) -> None:
    told = tokenizer_assets(metadata, 1000)
    old = {key: value for key, value in metadata.items() if not key.endswith(("bos_token_id", "eos_token_id"))}
    assert old != metadata
    assert tokenizer_assets(old, 1000) == told


def test_googles_own_files_of_gemma(metadata: dict[str, Any]) -> None:
    """They do not say that no space is put before a text, nor that the tokens of a turn are special."""
    given = {key: value for key, value in metadata.items() if not key.endswith("add_space_prefix")}
    tokens = [*given["tokenizer.ggml.tokens"]]
    tokens[-1] = "<start_of_turn>"
    given |= {"general.architecture": "gemma3", "tokenizer.ggml.tokens": tokens}
    tokenizer = Tokenizer.from_str(tokenizer_assets(given, 1000)["tokenizer.json"])
    words = tokenizer.encode("the", add_special_tokens=False).ids
    assert tokenizer.encode("<start_of_turn>the", add_special_tokens=False).ids == [len(tokens) - 1, *words]
    assert not tokenizer.id_to_token(words[0]).startswith(SPACE)


def test_a_model_with_it(metadata: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model("gemma2", vocab_size=1000, head_dim=16, query_pre_attn_scalar=16, tie_word_embeddings=True)
    write_gguf(tmp_path / "a.gguf", model, metadata=metadata, remove=("tokenizer.ggml.merges",))
    checkpoint = open_checkpoint(tmp_path / "a.gguf")
    assert Tokenizer.from_str(checkpoint.assets["tokenizer.json"]).encode("The layers").ids[0] == 1


def vocabulary(metadata: dict[str, Any], pieces: list[str]) -> dict[str, Any]:
    more = {"tokens": pieces, "token_type": [1] * len(pieces), "scores": [0.0] * len(pieces)}
    return {name: metadata[f"tokenizer.ggml.{name}"] + added for name, added in more.items()}


RUNS = {letter * count for letter in "ABCDEFGH" for count in range(1, 60)}
WRONG: list[tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = [
    *((lambda _, found=found: {"scores": found}, "expected a number per token")  # type: ignore[misc]
      for found in (None, [0.0], [float("nan")] * 700, ["x"] * 700)),
    (lambda _: {"add_space_prefix": 3}, "add_space_prefix"),
    (lambda all: {"tokens": [*all["tokenizer.ggml.tokens"][:-1], "a" * 1000]}, "of 1000 letters; 256 are supported"),
    # What would take far more memory than its file.
    (lambda all: vocabulary(all, sorted(RUNS - {*all["tokenizer.ggml.tokens"]})), r"one another: it has \d+ merges"),
    (lambda all: vocabulary(all, [f"{number:04d}" * 32 for number in range(4000)]), "over 16 letters on average"),
    (lambda all: {"token_type": [3 if kind in (2, 6) else kind for kind in all["tokenizer.ggml.token_type"]]},
     "neither a token for what it does not know nor one for every byte"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "wrong"), WRONG)
def test_what_cannot_be_used(
    metadata: dict[str, Any], changes: Callable[[dict[str, Any]], dict[str, Any]], wrong: str
) -> None:
    given = {f"tokenizer.ggml.{name}": value for name, value in changes(metadata).items()}
    with pytest.raises(CheckpointError, match=wrong):
        tokenizer_assets(metadata | given, 10_000)


def test_special_tokens_of_phi3_take_the_space_after_them(metadata: dict[str, Any]) -> None:
    """As its own tokenizer.json has it, but for three of them; of other families nothing is taken."""
    for family, expected in (("phi3", "<|mark|>two</s>three<s>"), ("llama", "<|mark|>\ntwo</s>\nthree<s>")):
        assets = tokenizer_assets(metadata | {"general.architecture": family}, 2000)
        tokenizer = Tokenizer.from_str(assets["tokenizer.json"])
        ids = tokenizer.encode("<|mark|>\ntwo</s>\nthree<s>\nfour", add_special_tokens=False).ids
        assert tokenizer.decode(ids, skip_special_tokens=False).replace(" ", "") == f"{expected}\nfour"
