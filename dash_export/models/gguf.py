"""A GGUF file as a Checkpoint: Hugging Face names, [out, in] matrices, half-split rotary layout, float32 rows.

Its metadata become the Hugging Face config that the model would have had: both kinds of checkpoint share the family
code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dash_export.artifacts import identity
from dash_export.errors import CheckpointError
from dash_export.models.decoder import MAX_HEAD_DIM, MAX_HEADS, MAX_HIDDEN, MAX_INTERMEDIATE, MAX_LAYERS
from dash_export.models.fields import positive_float, positive_int, shown
from dash_export.models.gguf_file import GgufFile, GgufTensor, read_gguf
from dash_export.models.registry import decoder_spec, supported_model_types
from dash_export.models.rope import MAX_POSITIONS, base_frequencies, llama3_frequencies
from dash_export.models.spec import Checkpoint, DecoderSpec, Float32Array
from dash_export.models.tokenizer_gguf import token_id, tokenizer_assets
from dash_export.models.weights import check_weights, fingerprint, read_in_chunks, require

_ROPE_FACTORS = "rope_freqs.weight"
_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
# Llama 3.1's numbers, the same in every release; GGUF keeps only the divisors that follow from them.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@dataclass(frozen=True)
class GgufWeight:
    """One tensor of a GGUF file. `interleaved_heads` > 0: so many heads whose rotary pairs lie side by side in it."""

    path: Path
    name: str
    tensor: GgufTensor
    interleaved_heads: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    def read_rows(self, start: int, stop: int) -> Float32Array:
        """Rows [start, stop) as float32, dequantised. Raises CheckpointError naming the tensor."""
        return read_in_chunks(
            self.name, self.shape, start, stop, self._read_heads if self.interleaved_heads else self._read
        )

    def _read(self, start: int, stop: int) -> npt.NDArray[Any]:
        if len(self.shape) == 1:
            return self._dequantized(0, 1)[0, start:stop]
        return self._dequantized(start, stop)

    def _read_heads(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Undo the converter's permutation: row 2i + j of a GGUF head is row j * head_dim / 2 + i in Hugging Face's."""
        head_dim = self.shape[0] // self.interleaved_heads
        first, last = start // head_dim, -(-stop // head_dim)
        rows = self._read(first * head_dim, last * head_dim)
        split = rows.reshape(last - first, head_dim // 2, 2, *self.shape[1:]).swapaxes(1, 2)
        permuted: npt.NDArray[Any] = split.reshape(rows.shape)
        return permuted[start - first * head_dim : stop - first * head_dim]

    def _dequantized(self, start: int, stop: int) -> npt.NDArray[Any]:
        # Read, not mapped: the resident set does not grow with the part of the model read so far.
        gguf, tensor = require("gguf"), self.tensor
        try:
            with self.path.open("rb") as file:
                file.seek(tensor.offset + start * tensor.row_bytes)
                data = file.read((stop - start) * tensor.row_bytes)
        except OSError as error:
            raise CheckpointError(f"cannot read tensor {self.name} in {self.path}: {error.strerror}") from error
        if len(data) != (stop - start) * tensor.row_bytes:
            raise CheckpointError(f"{self.path} ends inside tensor {self.name}: the file changed while it was read")
        rows = np.frombuffer(data, dtype=np.uint8).reshape(stop - start, tensor.row_bytes)
        quantization = gguf.GGMLQuantizationType(tensor.quantization)
        try:
            return gguf.dequantize(rows, quantization)  # type: ignore[no-any-return]
        except NotImplementedError:
            raise CheckpointError(
                f"tensor {self.name} in {self.path} has type {quantization.name}, which cannot be dequantised; "
                "supported: F32, F16, BF16, Q4_0 to Q8_0, the K- and IQ-quants"
            ) from None


def open_gguf(path: Path) -> Checkpoint:
    """The model, tokenizer and chat template of a GGUF file.

    Raises CheckpointError for a damaged file, an architecture, option or tokenizer that is not supported, and for
    tensors that this architecture does not use (dropping a bias in silence would give another model).
    """
    seen = {path: identity(path)}
    file = read_gguf(path)
    config = _config(file)
    spec = decoder_spec(config)
    stored = _stored_names(spec)
    unused = sorted(file.tensors.keys() - set(stored.values()) - {_ROPE_FACTORS})
    if unused:
        raise CheckpointError(
            f"{path} holds {len(unused)} tensors that {spec.model_type} does not use, the first is "
            f"{unused[0][:100]!r}; this variant is not supported"
        )
    found = {
        name: GgufWeight(path, name, file.tensors[gguf_name], _interleaved_heads(spec, name))
        for name, gguf_name in stored.items()
        if gguf_name in file.tensors
    }
    weights = check_weights(spec, found, str(path))
    for weight in weights.values():
        weight.read_rows(0, 1)  # an unsupported quantisation is known now, not in the middle of an export
    config_text = json.dumps(config, indent=2) + "\n"
    tensors = [
        f"{name} {list(weight.shape)} {file.tensors[stored[name]].quantization}" for name, weight in weights.items()
    ]
    return Checkpoint(
        source=str(path),
        spec=spec,
        config=config,
        weights=weights,
        assets={"config.json": config_text} | tokenizer_assets(file.metadata, spec.vocab_size),
        fingerprint=fingerprint(config_text, tensors, [path]),
        seen=seen,
    )


def _config(file: GgufFile) -> dict[str, Any]:
    """The Hugging Face config. Raises CheckpointError for an unknown architecture, and for metadata that is missing or
    of the wrong type.
    """
    metadata = file.metadata
    model_type = metadata.get("general.architecture")
    if not isinstance(model_type, str) or model_type not in _ARCHITECTURES:
        raise CheckpointError(
            f"GGUF architecture {shown(model_type)} is not supported; supported: {', '.join(supported_model_types())}"
        )
    _refuse_unsupported(metadata, model_type)
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError(f"{file.path} lacks the tensor token_embd.weight (a vocabulary-only or adapter file?)")
    hidden_size = positive_int(metadata, f"{model_type}.embedding_length", MAX_HIDDEN)
    num_heads = positive_int(metadata, f"{model_type}.attention.head_count", MAX_HEADS)
    # The defaults of both are llama.cpp's.
    equal_share = max(1, hidden_size // num_heads)
    head_dim = positive_int(metadata, f"{model_type}.attention.key_length", MAX_HEAD_DIM, equal_share)
    rope_dim = positive_int(metadata, f"{model_type}.rope.dimension_count", MAX_HEAD_DIM, head_dim)
    if positive_int(metadata, f"{model_type}.attention.value_length", MAX_HEAD_DIM, head_dim) != head_dim:
        raise CheckpointError(f"{file.path} has values and keys of different length, which is not supported")
    config: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[model_type]],
        "model_type": model_type,
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden_size,
        "intermediate_size": positive_int(metadata, f"{model_type}.feed_forward_length", MAX_INTERMEDIATE),
        "num_hidden_layers": positive_int(metadata, f"{model_type}.block_count", MAX_LAYERS),
        "num_attention_heads": num_heads,
        "num_key_value_heads": positive_int(metadata, f"{model_type}.attention.head_count_kv", MAX_HEADS, num_heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": positive_int(metadata, f"{model_type}.context_length", MAX_POSITIONS),
        "rms_norm_eps": positive_float(metadata, f"{model_type}.attention.layer_norm_rms_epsilon", 1.0),
        "rope_parameters": _rope(file, model_type, head_dim),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": model_type != "qwen2" and "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
        "dtype": "float32",
    }
    if rope_dim != head_dim:
        config["partial_rotary_factor"] = rope_dim / head_dim  # the family refuses it and says why
    for key, name in (("bos", "bos"), ("eos", "eos"), ("padding", "pad")):
        if (token := token_id(metadata, key)) is not None:
            config[f"{name}_token_id"] = token
    return config


_KNOWN = {
    *("block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size", "tensor_data_layout"),
    *(f"attention.{name}" for name in ("head_count", "head_count_kv", "key_length", "value_length")),
    *("attention.layer_norm_rms_epsilon", "rope.dimension_count", "rope.freq_base", "rope.scale_linear"),
    *(f"rope.scaling.{name}" for name in ("type", "factor", "original_context_length", "finetuned")),
}
"""Keys of an architecture that are read, or that change nothing."""


def _refuse_unsupported(metadata: Mapping[str, Any], model_type: str) -> None:
    if metadata.get("general.type", "model") != "model":
        raise CheckpointError(f"the GGUF file is a {shown(metadata['general.type'])}; expected a model")
    if metadata.get(f"{model_type}.expert_count"):
        raise CheckpointError("mixture-of-experts models (expert_count) are not supported; supported: dense decoders")
    if metadata.get(f"{model_type}.attention.sliding_window"):
        raise CheckpointError("attention.sliding_window is not supported; supported: full attention in every layer")
    if not metadata.get(f"{model_type}.attention.causal", True):
        raise CheckpointError("attention.causal = false is not supported; supported: causal attention")
    shards = metadata.get("split.count", 0)
    if not isinstance(shards, int) or shards > 1:
        raise CheckpointError(
            f"the GGUF file is one of {shown(shards)} shards; join them first: llama-gguf-split --merge"
        )
    # A key that we do not know may make it another model: a scale, soft-capping, a misspelled base.
    own = {key: value for key, value in metadata.items() if key.startswith(f"{model_type}.")}
    unknown = [key for key, value in own.items() if key.partition(".")[2] not in _KNOWN and value not in (0, "")]
    unknown = [key for key in unknown if key != f"{model_type}.attention.causal"]
    if unknown:
        raise CheckpointError(
            f"the GGUF file sets {unknown[0][:100]!r}, which is not supported here: the model would be another one"
        )


def _rope(file: GgufFile, model_type: str, head_dim: int) -> dict[str, Any]:
    metadata = file.metadata
    theta = positive_float(metadata, f"{model_type}.rope.freq_base", 1e12, 10_000.0)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    # As llama.cpp: a factor without a type is linear, and a factor of 0 is none.
    factor = metadata.get(f"{model_type}.rope.scaling.factor", metadata.get(f"{model_type}.rope.scale_linear"))
    factor = None if factor == 0 else factor
    scaling = metadata.get(f"{model_type}.rope.scaling.type", "none" if factor is None else "linear")
    if _ROPE_FACTORS in file.tensors:
        if scaling not in ("none", "llama3"):
            raise CheckpointError(f"rope scaling {shown(scaling)} together with {_ROPE_FACTORS} is not supported")
        return rope | _llama3(GgufWeight(file.path, _ROPE_FACTORS, file.tensors[_ROPE_FACTORS]), theta, head_dim)
    if scaling != "none":
        return rope | {"rope_type": scaling, "factor": factor}
    return rope


def _llama3(weight: GgufWeight, theta: float, head_dim: int) -> dict[str, Any]:
    """Llama 3's scaling by its name, from the divisors [head_dim / 2] that a converter made of it; where all are 1,
    none. Raises CheckpointError for others.
    """
    if weight.shape == (head_dim // 2,):
        factors, plain = weight.read_rows(0, head_dim // 2), base_frequencies(theta, head_dim)
        if (factors == 1).all():
            return {}
        factor = float(factors.max())
        with np.errstate(all="ignore"):
            named = llama3_frequencies(plain, factor, *_LLAMA3.values())
            if factor > 1 and np.allclose(plain / factors, named, rtol=1e-5, atol=0):
                return {"rope_type": "llama3", "factor": factor, **_LLAMA3}
    raise CheckpointError(
        f"{weight.name} in {weight.path}, {list(weight.shape)}, are not the divisors of Llama 3's rope scaling; "
        "no other scaling of this kind is supported. Export from the model's Hugging Face folder instead"
    )


def _stored_names(spec: DecoderSpec) -> dict[str, str]:
    """Hugging Face name -> GGUF name of every weight."""
    gguf = require("gguf")
    architecture = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == spec.model_type)
    names = gguf.get_tensor_name_map(architecture, spec.num_layers)
    return {name: names.get_name(name, try_suffixes=(".weight", ".bias")) for name in spec.weight_shapes()}


def _interleaved_heads(spec: DecoderSpec, name: str) -> int:
    # llama.cpp rotates neighbouring pairs for its `llama` architecture only; its converter permutes Q and K to match.
    if spec.model_type != "llama":
        return 0
    if ".q_proj." in name:
        return spec.num_heads
    return spec.num_kv_heads if ".k_proj." in name else 0
