import struct
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoConfig
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from dash_export.errors import CheckpointError
from dash_export.models import open_checkpoint
from tests.commands.helpers import python
from tests.models.helpers import WALK, assert_same_model, assert_same_weights, save_tiny, tiny_model, write_gguf
from tests.tiny import GRANITE, LLAMA3, LONGROPE


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def tiny_bytes(model: Any, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, model)
    return path.read_bytes()


GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 9, "tie_word_embeddings": True}
ROPES = {
    "full_attention": {"rope_type": "default", "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
YARN |= {"beta_fast": 16.0}
YARN_KEYS = {"type": "yarn", "factor": 4.0, "original_context_length": 64, "yarn_beta_fast": 16.0}
EARLIER = {"original_max_position_embeddings": 64, "max_position_embeddings": 256, "rope_parameters": LONGROPE}
EARLIER_KEY = {"phi3.rope.scaling.original_context_length": 64}
SCALED = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}}
HALF = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
NO_CAPS: dict[str, Any] = dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping"))
GRANITE_4 = {
    "granite.attention.head_count_kv": [2, 2],
    "granite.expert_shared_feed_forward_length": 96,
    "granite.rope.scaling.finetuned": True,
    "granite.ssm.conv_kernel": 4,
    "granite.ssm.state_size": 256,
    "granite.ssm.group_count": 1,
    "granite.ssm.inner_size": 128,
    "granite.ssm.time_step_rank": 128,
}
"""A dense model, from the converter of the hybrid ones."""


@pytest.mark.parametrize(
    ("family", "options", "metadata"),
    [
        ("llama", {}, {}),
        ("llama", {"tie_word_embeddings": True, "rms_norm_eps": 1e-5, "num_hidden_layers": 3}, {}),
        ("llama", {"attention_bias": True, "head_dim": 32}, {}),
        ("qwen2", {}, {}),
        ("qwen3", {"head_dim": 32}, {}),
        ("gemma2", GEMMA, {}),
        ("gemma2", GEMMA | NO_CAPS, {f"gemma2.{name}": 0.0 for name in NO_CAPS}),
        ("gemma2", GEMMA | {"num_hidden_layers": 46, "head_dim": 8, "intermediate_size": 32}, {}),
        ("gemma3_text", GEMMA | {"num_hidden_layers": 7, "rope_parameters": ROPES}, {}),
        (
            "gemma3_text",
            GEMMA | {"rope_parameters": ROPES | SCALED},
            {"gemma3.rope.scaling.type": "linear", "gemma3.rope.scaling.factor": 8.0},
        ),
        ("gemma3_text", GEMMA, {"gemma3.mm.tokens_per_image": 256, "gemma3.vision.block_count": 27}),
        ("phi3", {"sliding_window": 9}, {"phi3.rope.dimension_count": 16}),
        ("phi3", {"rope_parameters": HALF}, {"phi3.rope.dimension_count": 8}),
        ("phi3", EARLIER, EARLIER_KEY | {"phi3.rope.scaling.attn_factor": 1.1547}),
        ("phi3", EARLIER, EARLIER_KEY | {"phi3.rope.scaling.type": "longrope"}),
        ("granite", GRANITE, {"granite.rope.scaling.finetuned": True}),
        ("granite", GRANITE, GRANITE_4),
        ("qwen2", {"rope_parameters": YARN}, {f"qwen2.rope.scaling.{key}": value for key, value in YARN_KEYS.items()}),
        ("smollm3", {"num_hidden_layers": 6}, {}),
        ("olmo2", {"rms_norm_eps": 1e-5}, {}),
    ],
)
def test_as_the_folder_of_the_same_model(
    tmp_path: Path, family: str, options: dict[str, Any], metadata: dict[str, Any]
) -> None:
    """Every fact of the model, and every weight; keys that a converter leaves out are as llama.cpp has them."""
    model = save_tiny(tmp_path / "folder", family, pad_token_id=0, **options)
    longs = model.config.rope_parameters.get("long_factor")
    extra = {
        f"rope_factors_{name}.weight": np.array(model.config.rope_parameters[f"{name}_factor"], np.float32)
        for name in ("long", "short") * bool(longs)
    }
    write_gguf(tmp_path / "tiny.gguf", model, metadata=metadata, extra_tensors=extra)
    folder, file = open_checkpoint(tmp_path / "folder"), open_checkpoint(tmp_path / "tiny.gguf")
    same = {"name": folder.spec.name, "rope_frequencies": folder.spec.rope_frequencies}  # which GGUF has in float32
    assert replace(file.spec, **same) == folder.spec
    np.testing.assert_allclose(file.spec.rope_frequencies, folder.spec.rope_frequencies, rtol=1e-6)
    assert set(file.weights) == set(folder.weights)
    for name in file.weights:
        np.testing.assert_array_equal(file.read(name), folder.read(name), name)
    again = AutoConfig.for_model(**file.config)  # transformers reads our config to the same model
    assert again.rope_parameters.get("rope_theta") == model.config.rope_parameters.get("rope_theta")
    assert again.eos_token_id == 258


def test_what_converters_left_out(tmp_path: Path) -> None:
    """Of Gemma 2 it is the released models' values; of Granite llama.cpp's scale, not transformers', which is 1."""
    keys = ("attn_logit_softcapping", "final_logit_softcapping", "attention.sliding_window")
    model = tiny_model("gemma2", **GEMMA | {"max_position_embeddings": 8192})
    write_gguf(tmp_path / "a.gguf", model, remove=tuple(f"gemma2.{key}" for key in keys))
    traits = open_checkpoint(tmp_path / "a.gguf").spec.traits
    assert (traits.score_cap, traits.logits_cap, set(traits.windows)) == (50, 30, {0, 4096})
    write_gguf(tmp_path / "b.gguf", tiny_model("granite"), remove=("granite.attention.scale",))
    spec = open_checkpoint(tmp_path / "b.gguf").spec
    assert spec.attention_scale == pytest.approx(spec.head_dim**-0.5)


@pytest.mark.parametrize(
    ("metadata", "divisor"),
    [
        ({"llama.rope.scaling.factor": 4.0}, 4.0),
        ({"llama.rope.scale_linear": 4.0}, 4.0),
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}, 4.0),
        ({"llama.rope.scaling.factor": 0.0}, 1.0),
        ({"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}, 1.0),
        ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.original_context_length": 64}, 1.0),
        ({"llama.attention.causal": True, "llama.pooling_type": 0}, 1.0),
    ],
)
def test_linear_scaling_as_llama_cpp_reads_it(
    tmp_path: Path, model: Any, metadata: dict[str, Any], divisor: float
) -> None:
    write_gguf(tmp_path / "tiny.gguf", model, metadata=metadata)
    expected = model.model.rotary_emb.inv_freq.numpy() / divisor
    np.testing.assert_allclose(open_checkpoint(tmp_path / "tiny.gguf").spec.rope_frequencies, expected, rtol=1e-6)


def test_llama3_rope_factors_become_the_named_scaling(tmp_path: Path) -> None:
    scaled = tiny_model("llama", head_dim=64, rope_parameters=LLAMA3)
    plain = tiny_model("llama", head_dim=64, rope_parameters={"rope_type": "default", "rope_theta": 500_000.0})
    factors = (plain.model.rotary_emb.inv_freq / scaled.model.rotary_emb.inv_freq).numpy()
    assert factors.max() == 8
    write_gguf(tmp_path / "tiny.gguf", scaled, extra_tensors={"rope_freqs.weight": factors})
    checkpoint = open_checkpoint(tmp_path / "tiny.gguf")
    assert_same_model(checkpoint, scaled)
    assert checkpoint.config["rope_parameters"] == LLAMA3


METADATA = [
    ({"llama.block_count": "two"}, "num_hidden_layers"),
    ({"llama.block_count": 3}, "lacks"),
    ({"llama.embedding_length": 128}, "shape"),
    ({"llama.attention.head_count_kv": [2, 2]}, "num_key_value_heads"),
    ({"llama.attention.value_length": 8}, "length"),
    ({"llama.rope.dimension_count": 8}, "rope.dimension_count"),
    ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.yarn_attn_factor": 1.2}, "yarn_attn_factor"),
    (
        {"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 4.0},
        "supported: none, linear, llama3, yarn",
    ),
    ({"granite.attention.head_count_kv": [2, 0]}, "num_key_value_heads"),
    ({"granite.expert_count": 2}, "granite.expert_count, which is not supported"),
    ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.yarn_ext_factor": 0.0}, "yarn_ext_factor"),
    ({"llama.rope.scaling.type": "default", "llama.rope.scaling.factor": 4.0}, "'default' is not supported"),
    ({"llama.rope.freq_base": -1.0}, "rope_theta"),
    ({"llama.attention.sliding_window": 4096}, "sliding"),
    ({"llama.rope.freq_bast": 500000.0}, "freq_bast"),
    ({"llama.attention.causal": False}, "causal"),
    ({"llama.rope.scaling.attn_factor": 1.2}, "attn_factor"),
    ({"gemma2.rope.dimension_count": 8}, "rope.dimension_count 8 is not supported"),
    ({"granite.rope.scaling.finetuned": False}, "without RoPE"),
    ({"phi3.rope.scaling.attn_factor": 1.3}, r"attn_factor 1\.3 is not supported; expected 1"),
    *(
        ({f"phi3.{key}": value}, f"{key}|head_dim")
        for key in ("attention.key_length", "rope.dimension_count")
        for value in (0, [1, 2])
    ),
]


def tensors(value: np.ndarray, *names: str) -> dict[str, Any]:
    return {"extra_tensors": {f"{name}.weight": value.astype(np.float32) for name in names}}


LONG, SHORT, ONES = "rope_factors_long", "rope_factors_short", np.ones(8)
NO_NORM: dict[str, Any] = {"remove": ("model.norm.weight",)}
OTHERS: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"metadata": {"general.architecture": "gpt2"}}, "gpt2.*llama, qwen2, qwen3"),
    ("llama", {"metadata": {"general.type": "adapter"}}, "adapter"),
    ("llama", {"metadata": {"split.count": "two"}}, "shards"),
    ("llama", {"metadata": {"split.count": 3}}, "llama-gguf-split"),
    ("llama", {"metadata": {"tokenizer.ggml.eos_token_id": 259}}, "eos_token_id"),
    ("llama", {"remove": ("llama.attention.layer_norm_rms_epsilon",)}, "rms_epsilon"),
    ("llama", NO_NORM, r"model\.norm\.weight"),
    ("llama", {"remove": ("model.embed_tokens.weight",)}, "token_embd"),
    ("llama", tensors(np.ones(16), "blk.0.attn_q_norm"), "attn_q_norm"),
    ("llama", NO_NORM | {"extra_tensors": {"output_norm.weight": np.ones(64, np.int32)}}, r"output_norm\.weight.*I32"),
    *(
        ("llama", tensors(wrong, "rope_freqs"), "rope_freqs")
        for wrong in (np.ones(7), np.zeros(8), np.full(8, np.nan), np.ones((2, 4)), np.linspace(1, 3, 8))
    ),
    ("qwen2", tensors(ONES, "rope_freqs"), "qwen2 does not use, the first is 'rope_freqs"),
    ("gemma2", tensors(ONES, LONG), "tensors that gemma2 does not use"),
    ("phi3", tensors(ONES, LONG), "and not the other"),
    *(  # which are not read: a small file can have very long ones
        ("phi3", tensors(np.ones(shape), LONG, SHORT), r"rope_factors_long.weight has the shape .*; expected \[8\]")
        for shape in (4096, (8, 2), 7)
    ),
]
OPTIONS: dict[str, dict[str, Any]] = {"gemma2": GEMMA, "phi3": {"pad_token_id": 0}, "granite": GRANITE}


@cache
def random_model(family: str) -> Any:
    return tiny_model(family, **OPTIONS.get(family, {}))


@pytest.mark.parametrize(
    ("family", "given", "message"),
    [*((next(iter(data)).partition(".")[0], {"metadata": data}, said) for data, said in METADATA), *OTHERS],
)
def test_what_is_wrong_or_not_supported(tmp_path: Path, family: str, given: dict[str, Any], message: str) -> None:
    write_gguf(tmp_path / "tiny.gguf", random_model(family), **given)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "tiny.gguf")


def uint64_at(data: bytes, offset: int, value: int) -> bytes:
    return data[:offset] + value.to_bytes(8, "little") + data[offset + 8 :]


def with_offset(data: bytes, name: str, change: Callable[[int], int]) -> bytes:
    """The file with another offset for one tensor."""
    at = data.index(name.encode()) + len(name)
    at += 4 + 8 * int.from_bytes(data[at : at + 4], "little") + 4
    return uint64_at(data, at, change(int.from_bytes(data[at : at + 8], "little")) % (1 << 64))


LAYOUTS: dict[str, Callable[[bytes], bytes]] = {
    "overlap": lambda data: with_offset(data, "blk.0.attn_v.weight", lambda offset: offset - 32),
    "gap": lambda data: with_offset(data, "output.weight", lambda offset: offset + 32) + bytes(32),
    "wrapping": lambda data: with_offset(data, "blk.0.attn_v.weight", lambda offset: offset - (1 << 63)),
    "trailing": lambda data: data + bytes(1),
    "alignment": lambda data: data.replace(b"general.alignment\4\0\0\0\x20", b"general.alignment\4\0\0\0\x30"),
    "other alignment": lambda data: data.replace(b"general.alignment\4\0\0\0\x20", b"general.alignment\4\0\0\0\x40"),
    "two names alike": lambda data: data.replace(b"blk.0.attn_v.weight", b"blk.0.attn_k.weight"),
    "two keys alike": lambda data: data.replace(b"tokenizer.ggml.bos_token_id", b"tokenizer.ggml.eos_token_id"),
}


@pytest.mark.parametrize("what", ["tensors", "keys", "first key", "tokens", "token types"])
def test_absurd_lengths_and_cut_files_fail_at_once(tmp_path: Path, tiny_bytes: bytes, what: str) -> None:
    # After a key: its type and the elements' type, 4 bytes each.
    arrays = {"tokens": b"tokenizer.ggml.tokens", "token types": b"tokenizer.ggml.token_type"}
    places = {name: tiny_bytes.index(key) + len(key) + 8 for name, key in arrays.items()}
    places |= {"tensors": 8, "keys": 16, "first key": 24}
    path = tmp_path / "tiny.gguf"
    absurd = [uint64_at(tiny_bytes, places[what], value) for value in (1 << 17, 1 << 40, (1 << 64) - 1)]
    for content in (*absurd, tiny_bytes[: places[what]], b"GGUF\x01\0\0\0" + bytes(64), tiny_bytes[:-64]):
        path.write_bytes(content)
        started = time.monotonic()
        with pytest.raises(CheckpointError, match="GGUF"):
            open_checkpoint(path)
        assert time.monotonic() - started < 2


@pytest.mark.parametrize(("at", "what"), [(8, "tensors"), (16, "metadata keys")])
def test_more_than_there_may_be(tmp_path: Path, tiny_bytes: bytes, at: int, what: str) -> None:
    """It is refused before any is read."""
    path = tmp_path / "tiny.gguf"
    path.write_bytes(uint64_at(tiny_bytes, at, 1 << 17))
    with pytest.raises(CheckpointError, match=f"it announces 131072 {what}, and there may be 65536"):
        open_checkpoint(path)


@pytest.mark.parametrize("name", LAYOUTS)
def test_tensors_that_do_not_lie_one_after_another(tmp_path: Path, model: Any, name: str) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, model, metadata={"general.alignment": 32})
    path.write_bytes(LAYOUTS[name](path.read_bytes()))
    with pytest.raises(CheckpointError, match="damaged GGUF file"):
        open_checkpoint(path)


def test_the_end_may_be_padded_or_not(tmp_path: Path) -> None:
    model, path = tiny_model("llama", head_dim=12), tmp_path / "tiny.gguf"
    write_gguf(path, model, extra_tensors={"rope_freqs.weight": np.ones(6, np.float32)})
    whole = path.read_bytes()
    for padding in (8, 3, 0):
        path.write_bytes(whole[: len(whole) - 8 + padding])
        assert_same_model(open_checkpoint(path), model)


def test_metadata_takes_no_multiple_of_the_file(tmp_path: Path, tiny_bytes: bytes) -> None:
    """Arrays nobody reads, far more than a vocabulary has: Python's objects are larger than what they are made of."""
    arrays, count, path = 5, 1 << 19, tmp_path / "tiny.gguf"
    keys = int.from_bytes(tiny_bytes[16:24], "little") + arrays
    entries = b"".join(struct.pack("<QcIIQ", 1, b"%d" % name, 9, 0, count) + bytes(count) for name in range(arrays))
    path.write_bytes(tiny_bytes[:16] + keys.to_bytes(8, "little") + entries + tiny_bytes[24:])
    with pytest.raises(CheckpointError, match="elements in arrays"):
        open_checkpoint(path)


@pytest.mark.model
def test_smollm2_equals_transformers(smollm2_gguf: Path) -> None:
    checkpoint = open_checkpoint(smollm2_gguf)
    config = transformers.LlamaConfig(**checkpoint.config)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    # What from_pretrained(gguf_file=...) calls, without its need for accelerate.
    loaded = load_gguf_checkpoint(str(smollm2_gguf), return_tensors=True, model_to_load=model)
    assert set(checkpoint.weights) == set(loaded["tensors"])
    assert_same_weights(checkpoint, loaded["tensors"], block_bytes=1 << 20)
    expected = transformers.AutoConfig.for_model(**loaded["config"])
    inverse_frequencies = type(model.model.rotary_emb)(expected).inv_freq.numpy()
    np.testing.assert_allclose(checkpoint.spec.rope_frequencies, inverse_frequencies, rtol=1e-6)
    assert checkpoint.config["rms_norm_eps"] == 1e-5
    for key in ("hidden_size", "num_hidden_layers", "head_dim", "eos_token_id", "tie_word_embeddings"):
        assert getattr(config, key) == getattr(expected, key)


@pytest.mark.model
def test_walking_all_weights_stays_small(smollm2_gguf: Path) -> None:
    """File 94 MB, weights 515 MB as float32, the largest 108 MB: none of them may become resident as a whole."""
    assert int(python(WALK, smollm2_gguf).stdout) < 50
