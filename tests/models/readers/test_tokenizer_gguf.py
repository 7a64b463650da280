import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

from dash_export.errors import CheckpointError
from dash_export.models import open_checkpoint
from dash_export.models.readers.tokenizer_gguf import _PRE_TOKENIZERS, tokenizer_assets
from tests.models.helpers import byte_tokens

TEXTS = [
    "Hello 2024!",
    "\n\n1. First\n\n2. Second",
    "def f(x):\n    return {'a': x ** 2}  # comment\n\n\n",
    "🙂👩‍👩‍👧 naïve café 中文 العربية",
    "  leading,   inner \t\t tabs   \r\n trailing   ",
    "It's they'll I'M 3.14159 12345 x1y22",
    "",
]


def metadata(pre: str, **changes: Any) -> dict[str, Any]:
    base = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": byte_tokens(),
        "tokenizer.ggml.token_type": [1] * 257 + [3, 3],
        "tokenizer.ggml.merges": ["h e"],
        "tokenizer.ggml.bos_token_id": 257,
        "tokenizer.ggml.eos_token_id": 258,
    }
    return base | {f"tokenizer.{key}": value for key, value in changes.items()}


def build(pre: str, **changes: Any) -> Tokenizer:
    return Tokenizer.from_str(tokenizer_assets(metadata(pre, **changes), 400)["tokenizer.json"])


@pytest.mark.parametrize("pre", _PRE_TOKENIZERS)
def test_round_trip(pre: str) -> None:
    tokenizer = build(pre)
    for text in TEXTS:
        expected = unicodedata.normalize("NFC", text) if pre == "qwen2" else text
        assert tokenizer.decode(tokenizer.encode(text).ids) == expected


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("smollm", ["It", "'s", " ", "1", "2", "3", "4", ".", "\n\n", "1"]),
        ("qwen2", ["It", "'s", " ", "1", "2", "3", "4", ".\n\n", "1"]),
        ("deepseek-r1-qwen", ["It", "'s", " ", "1", "2", "3", "4", ".\n\n", "1"]),
        ("llama-bpe", ["It", "'s", " ", "123", "4", ".\n\n", "1"]),
        ("gpt-4o", ["It's", " ", "123", "4", ".\n\n", "1"]),
        ("gpt-2", ["It", "'s", " 1234", ".", "\n", "\n", "1"]),
        ("default", ["It", "'", "s", " ", "123", "4", ".", "\n", "\n", "1"]),
        ("tekken", ["It", "'s", " ", "1", "2", "3", "4", ".\n\n", "1"]),
    ],
)
def test_words_split_as_the_model_was_trained(pre: str, expected: list[str]) -> None:
    text = "It's 1234.\n\n1"
    found = build(pre).pre_tokenizer.pre_tokenize_str(text)
    assert [text[start:end] for _, (start, end) in found] == expected


def test_qwen2_splits_as_transformers_does() -> None:
    reference = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    ours = build("qwen2").pre_tokenizer
    for text in TEXTS:
        assert ours.pre_tokenize_str(text) == reference.pre_tokenize_str(text)


def test_special_tokens() -> None:
    tokens = [*byte_tokens(), "<tool>"]
    tokenizer = build("smollm", **{"ggml.tokens": tokens, "ggml.token_type": [1] * 257 + [3, 3, 4]})
    ids = tokenizer.encode("<|im_start|>a<tool><|im_end|>").ids
    assert ids == [257, tokens.index("a"), 259, 258]
    assert tokenizer.decode(ids) == "a<tool>"  # a control token is special, a user-defined one is text
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|im_start|>a<tool><|im_end|>"


def test_bos_is_added_where_the_file_or_the_family_says_so() -> None:
    assert build("llama-bpe").encode("a").ids[0] == 257
    assert build("llama-bpe", **{"ggml.add_bos_token": False}).encode("a").ids[0] != 257
    assert build("smollm").encode("a").ids[0] != 257
    assert build("smollm", **{"ggml.add_bos_token": True}).encode("a").ids[0] == 257
    assert build("llama-bpe").encode("a", add_special_tokens=False).ids[0] != 257


@pytest.mark.parametrize(("architecture", "pre"), [("qwen2", "qwen2"), ("llama", "default")])
def test_old_files_name_no_pre_tokenizer(architecture: str, pre: str) -> None:
    told = metadata(pre, **{"ggml.add_bos_token": False}) | {"general.architecture": architecture}
    old = {key: value for key, value in told.items() if key != "tokenizer.ggml.pre"}
    assert tokenizer_assets(old, 400) == tokenizer_assets(told, 400)


def with_token(token: str, kind: int) -> dict[str, str]:
    """The assets of a vocabulary whose token 256 is this one."""
    tokens = [*byte_tokens()[:256], token, *byte_tokens()[257:]]
    given = {"ggml.tokens": tokens, "ggml.token_type": [1] * 256 + [kind, 3, 3], "ggml.merges": []}
    return tokenizer_assets(metadata("gpt-2", **given), 400)


@pytest.mark.parametrize("kind", [1, 3, 4])
def test_the_end_of_a_turn_is_known_by_its_name(kind: int) -> None:
    """Gemma's files name no `eot`; in some it is a token of the user's, and would be printed."""
    assets = with_token("<end_of_turn>", kind)
    assert json.loads(assets["generation_config.json"])["eos_token_id"] == [258, 256]
    tokenizer = Tokenizer.from_str(assets["tokenizer.json"])
    assert tokenizer.decode(tokenizer.encode("yes<end_of_turn>").ids) == "yes"


@pytest.mark.parametrize(("kind", "ends"), [(1, 258), (3, [258, 256])])
def test_an_end_that_may_be_text(kind: int, ends: object) -> None:
    """`</s>` is a tag of HTML in some vocabularies, and an end in others, where another is the file's own."""
    assert json.loads(with_token("</s>", kind)["generation_config.json"])["eos_token_id"] == ends


def test_other_assets() -> None:
    assets = tokenizer_assets(metadata("llama-bpe", **{"ggml.eot_token_id": 256, "chat_template": "{{ x }}"}), 400)
    assert json.loads(assets["generation_config.json"]) == {"bos_token_id": 257, "eos_token_id": [258, 256]}
    config = json.loads(assets["tokenizer_config.json"])
    assert (config["bos_token"], config["eos_token"], config["add_bos_token"]) == ("<|im_start|>", "<|im_end|>", True)
    assert assets["chat_template.jinja"] == "{{ x }}"
    assert "chat_template.jinja" not in tokenizer_assets(metadata("smollm"), 400)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ggml.model": "bert"}, "'bert' is not supported.*gpt2.*Hugging Face folder"),
        ({"ggml.pre": "falcon"}, "'falcon' is not supported.*smollm, refact, qwen2.*Hugging Face folder"),
        ({"ggml.tokens": [1, 2]}, "tokens"),
        ({"ggml.tokens": ["a"] * 259}, "twice"),
        ({"ggml.tokens": [str(index) for index in range(401)]}, "401 tokens; expected 1 to 400"),
        ({"ggml.token_type": [1]}, "token_type"),
        ({"ggml.merges": ["h e x"]}, "merges"),
        ({"ggml.merges": ["h nothing"]}, "cannot be used: .*nothing"),
        ({"ggml.merges": "h e"}, "merges"),
        ({"ggml.merges": ["h e"] * 2000}, "2000 merges for 259 tokens"),
        ({"ggml.bos_token_id": 259}, "bos_token_id"),
        ({"ggml.add_bos_token": "yes"}, "add_bos_token"),
        ({"ggml.add_eos_token": True}, "add_eos_token"),
        ({"chat_template": ["a"]}, "chat_template"),
        ({"ggml.token_type": [7] * 259}, "1 to 6"),
        # told when it is exported, not as damage of the bundle when that is run
        ({"ggml.tokens": [*byte_tokens()[:-1], "a" * 5000]}, "cannot be used: it has a text of over 4096 letters"),
    ],
)
def test_vocabularies_that_cannot_be_used(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        build("smollm", **changes)


@pytest.mark.model
def test_smollm2(smollm2_gguf: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(smollm2_gguf)
    tokenizer = Tokenizer.from_str(checkpoint.assets["tokenizer.json"])
    assert tokenizer.encode("<|im_start|>user<|im_end|>").ids == [1, 4093, 2]
    assert tokenizer.encode("\n\n1.").tokens == ["ĊĊ", "1", "."]
    assert tokenizer.encode("in 2024").tokens == ["in", "Ġ", "2", "0", "2", "4"]
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    for name, text in checkpoint.assets.items():
        (tmp_path / name).write_text(text)
    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert loaded.convert_tokens_to_ids(loaded.eos_token) == checkpoint.config["eos_token_id"]
    prompt = loaded.apply_chat_template(
        [{"role": "user", "content": "Hi 42"}], tokenize=False, add_generation_prompt=True
    )
    assert prompt.endswith("<|im_start|>user\nHi 42<|im_end|>\n<|im_start|>assistant\n")
    assert loaded(prompt)["input_ids"] == tokenizer.encode(prompt).ids
