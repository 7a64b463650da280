"""Tiny random checkpoints of every family, written by transformers and by gguf's own writer."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from dash_export.graphs.portable.ggml import BLOCKS
from dash_export.models import Checkpoint, row_blocks

DIMENSIONS: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}

# Opens argv[1], reads all by blocks, prints how far the peak resident set rises while it is read, in MB.
WALK = """
import sys
from pathlib import Path
from dash_export.models import open_checkpoint, row_blocks
from dash_export.backends.host.cpus import peak_memory
import dash_export.models.readers.gguf, dash_export.models.readers.huggingface, gguf, safetensors

checkpoint = open_checkpoint(sys.argv[1])  # its tokenizer takes more than all that follows
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = peak_memory()
for weight in checkpoint.weights.values():
    for rows in row_blocks(weight):
        pass
assert "torch" not in sys.modules and "transformers" not in sys.modules
print((peak_memory() - before) >> 20)
"""


def byte_tokens() -> list[str]:
    """The 256 byte-level tokens, one merge's result and two special tokens: 259 tokens."""
    return [*sorted(pre_tokenizers.ByteLevel.alphabet()), "he", "<|im_start|>", "<|im_end|>"]


def tiny_tokenizer() -> Tokenizer:
    tokens = byte_tokens()
    model = models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[("h", "e")])
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return tokenizer


def tiny_model(
    family: str,
    scaled: bool = False,
    kind: Any = transformers.AutoModelForCausalLM,
    outlier: float = 1.0,
    **options: Any,
) -> Any:
    """A random float32 transformers model; every tensor (biases and norms too) differs from its initial value.
    `scaled`: gains near one and matrices that keep the scale, so that attention is far from uniform and no layer is
    lost in another's noise. `outlier`: how much larger everything writes one channel of the states.
    """
    config = transformers.AutoConfig.for_model(family, **(DIMENSIONS | options))
    torch.manual_seed(0)
    model = kind.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + 0.2 * noise if scaled and "norm" in name else (0.17 if scaled else 0.05) * noise)
            if name.endswith("embed_tokens.weight"):
                parameter[:, 5] *= outlier
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter[5] *= outlier
    return model


def save_tiny(folder: Path, family: str, max_shard_size: str = "1GB", **options: Any) -> Any:
    model = tiny_model(family, **options)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
    return model


def edit_config(folder: Path, remove: tuple[str, ...] = (), **changes: Any) -> None:
    path = folder / "config.json"
    config = {key: value for key, value in json.loads(path.read_text()).items() if key not in remove}
    path.write_text(json.dumps(config | changes))


def assert_same_weights(checkpoint: Checkpoint, state: Mapping[str, Any], block_bytes: int = 3000) -> None:
    """Every weight equals the state dict's, read in blocks that do not divide the heads evenly."""
    for name, weight in checkpoint.weights.items():
        rows = np.concatenate(list(row_blocks(weight, block_bytes)))
        assert rows.dtype == np.float32
        np.testing.assert_array_equal(rows, state[name].float().numpy(), err_msg=name)


def assert_same_model(checkpoint: Checkpoint, model: Any) -> None:
    """Names, shapes, values and rotary frequencies agree with the transformers model."""
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    assert set(checkpoint.weights) == set(state)
    assert_same_weights(checkpoint, state)
    expected = model.model.rotary_emb.inv_freq.numpy()
    np.testing.assert_allclose(checkpoint.spec.rope_frequencies, expected, rtol=1e-6)
    assert checkpoint.spec.rms_norm_eps == model.config.rms_norm_eps


def with_header(data: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    size = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:size])
    change(header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[size:]


def moved(header: dict[str, Any], which: int, begin: int, end: int) -> None:
    """Shift where the data of one tensor (in the order of the data) begins and ends."""
    tensors = [entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"]
    offsets = sorted(tensors)[which]
    offsets[0] += begin
    offsets[1] += end


def twice(data: bytes) -> bytes:
    """The file with the final norm's name twice in its header, each time with the same place and another shape."""
    name, other = "model.norm.weight", "model.norm.weighT"

    def add(header: dict[str, Any]) -> None:
        header[other] = header[name] | {"shape": [*header[name]["shape"], 1]}

    return with_header(data, add).replace(other.encode(), name.encode())


SAFETENSORS_LAYOUTS: dict[str, Callable[[bytes], bytes]] = {
    "overlap": lambda data: with_header(data, lambda header: moved(header, 1, -4, -4)),
    "gap": lambda data: with_header(data, lambda header: moved(header, -1, 4, 4)) + bytes(4),
    "trailing": lambda data: data + bytes(4),
    "beyond": lambda data: with_header(data, lambda header: moved(header, -1, 1 << 40, 1 << 40)),
    "same": lambda data: with_header(data, lambda header: header.update(other=header[max(header)])),
    "twice": twice,
    "header longer than the file": lambda data: (len(data) * 4).to_bytes(8, "little") + data[8:],
    "absurd header": lambda data: ((1 << 64) - 1).to_bytes(8, "little") + data[8:],
}


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to the Q and K weights of `llama`."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


GGUF_OPTIONS = {
    "attention.sliding_window": ("sliding_window", ("gemma2", "gemma3", "phi3")),
    "attn_logit_softcapping": ("attn_logit_softcapping", ("gemma2",)),
    "final_logit_softcapping": ("final_logit_softcapping", ("gemma2", "gemma3")),
    "attention.scale": ("attention_multiplier", ("granite",)),
    "embedding_scale": ("embedding_multiplier", ("granite",)),
    "residual_scale": ("residual_multiplier", ("granite",)),
    "logit_scale": ("logits_scaling", ("granite",)),
}
"""Key of some architectures -> the config's name for it, and these architectures."""


def random_blocks(kind: str, rows: int = 8, columns: int = 512) -> np.ndarray:
    """Rows of a GGUF file [rows, bytes] whose every bit is random, but for finite factors: for types that the library
    does not write, too.
    """
    rng, block = np.random.default_rng(0), BLOCKS[kind]
    packed = rng.integers(0, 256, (rows, columns // block.weights, block.bytes), np.uint8)
    factors = (0.1 * rng.standard_normal((*packed.shape[:2], block.factors))).astype(np.float16).view(np.uint8)
    packed[..., slice(-2, None) if kind == "Q6_K" else slice(factors.shape[-1])] = factors
    return packed.reshape(rows, -1)


def write_gguf(
    path: Path,
    model: Any,
    *,
    pre: str = "smollm",
    quantize: str | None = None,
    metadata: Mapping[str, Any] | None = None,
    extra_tensors: Mapping[str, np.ndarray] | None = None,
    remove: tuple[str, ...] = (),
) -> None:
    """Write a transformers model as GGUF, as llama.cpp's converter would. `metadata` adds or replaces keys; `quantize`
    is the type of the matrices (of K-quants: random ones).
    """
    config = model.config
    family = {"gemma3_text": "gemma3"}.get(config.model_type, config.model_type)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    ropes = config.rope_parameters
    values: dict[str, Any] = {
        f"{family}.block_count": config.num_hidden_layers,
        f"{family}.context_length": config.max_position_embeddings,
        f"{family}.embedding_length": config.hidden_size,
        f"{family}.feed_forward_length": config.intermediate_size,
        f"{family}.attention.head_count": config.num_attention_heads,
        f"{family}.attention.head_count_kv": config.num_key_value_heads,
        f"{family}.attention.key_length": head_dim,
        f"{family}.attention.value_length": head_dim,
        f"{family}.rope.freq_base": float(ropes.get("full_attention", ropes)["rope_theta"]),
        f"{family}.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.bos_token_id": 257,
        "tokenizer.ggml.eos_token_id": 258,
        "tokenizer.chat_template": "{{ messages }}",
    }
    if family == "llama":
        values["llama.rope.dimension_count"] = head_dim
    for key, (option, families) in GGUF_OPTIONS.items():
        if family in families and getattr(config, option, None):
            values[f"{family}.{key}"] = getattr(config, option)
    values |= {
        "tokenizer.ggml.tokens": byte_tokens(),
        "tokenizer.ggml.token_type": [1] * 257 + [3, 3],
        "tokenizer.ggml.merges": ["h e"],
        **(metadata or {}),
    }
    writer = gguf.GGUFWriter(path, str(values.pop("general.architecture", family)))
    add = {bool: writer.add_bool, str: writer.add_string, list: writer.add_array, float: writer.add_float32}
    for key, value in values.items():
        if key not in remove:
            add.get(type(value), writer.add_uint32)(key, value)
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, family.upper()), config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name in remove or (name == "lm_head.weight" and config.tie_word_embeddings):
            continue
        array = tensor.numpy()
        if family in ("llama", "granite", "smollm3") and ".q_proj." in name:
            array = permuted(array, config.num_attention_heads)
        if family in ("llama", "granite", "smollm3") and ".k_proj." in name:
            array = permuted(array, config.num_key_value_heads)
        if family.startswith("gemma") and name.endswith("norm.weight"):
            array = array + 1
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if quantize is not None and array.ndim == 2:
            kind = gguf.GGMLQuantizationType[quantize]
            blocks = random_blocks(quantize, *array.shape) if quantize.endswith("K") else gguf.quantize(array, kind)
            writer.add_tensor(stored, blocks, raw_dtype=kind)
        else:
            writer.add_tensor(stored, np.ascontiguousarray(array))
    for name, array in (extra_tensors or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
