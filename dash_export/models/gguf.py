"""A GGUF file as a Checkpoint: Hugging Face names, [out, in] matrices, half-split rotary layout, float32 rows."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dash_export.artifacts import identity
from dash_export.errors import CheckpointError
from dash_export.models.decoder import MAX_HEAD_DIM
from dash_export.models.gguf_config import config_from_gguf
from dash_export.models.gguf_file import GgufTensor, read_gguf
from dash_export.models.registry import decoder_spec
from dash_export.models.spec import Checkpoint, DecoderSpec, Float32Array
from dash_export.models.tokenizer_gguf import tokenizer_assets
from dash_export.models.weights import check_weights, fingerprint, read_in_chunks, require

_ROPE_FACTORS = "rope_freqs.weight"


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
    factors = None
    if _ROPE_FACTORS in file.tensors:
        factors = _rope_factors(GgufWeight(path, _ROPE_FACTORS, file.tensors[_ROPE_FACTORS]))
    config = config_from_gguf(file, factors)
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


def _rope_factors(weight: GgufWeight) -> Float32Array:
    """The divisors of the rotary frequencies, float32 [head_dim / 2]. Raises CheckpointError."""
    if len(weight.shape) != 1 or weight.shape[0] > MAX_HEAD_DIM:
        raise CheckpointError(f"{weight.name} in {weight.path} has shape {list(weight.shape)}; expected [head_dim / 2]")
    factors = weight.read_rows(0, weight.shape[0])
    if not (factors > 0).all():
        raise CheckpointError(f"{weight.name} in {weight.path} holds divisors that are not positive")
    return factors


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
