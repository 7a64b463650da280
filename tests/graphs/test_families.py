"""Every family and every option, exported, built and run, against transformers itself and against the oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dash_export import DashRuntime
from dash_export.building import build
from dash_export.errors import BackendError
from dash_export.exporting import export
from dash_export.models import open_checkpoint
from dash_export.reference import Oracle
from tests.tiny import random_actions, random_ids, save_model, tiny_policy

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-multi-head": ("llama", {"num_key_value_heads": 4, "rms_norm_eps": 1e-2}),
    "llama-head-dim": ("llama", {"head_dim": 24}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied": (
        "qwen2",
        {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    ),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3-tied": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True, "attention_bias": True}),
    "llama-odd-width": ("llama", {"hidden_size": 48, "head_dim": 16}),
    "one-kv-head": ("llama", {"num_key_value_heads": 1}),
}
TOKENS = 70


@pytest.mark.parametrize("case", CASES)
def test_family(case: str, tmp_path: Path) -> None:
    family, options = CASES[case]
    model = save_model(tmp_path / "model", family, **({"num_hidden_layers": 6} | options))
    checkpoint = open_checkpoint(tmp_path / "model")
    policy = tiny_policy(checkpoint, "linear")
    oracle = Oracle(checkpoint, policy)
    bundle = export(checkpoint, tmp_path / "tiny.dash", policy)
    ids = random_ids(TOKENS)
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)[None]).logits[0].numpy()
    assert expected.std() > 0.3, "the tiny model says too little to compare"
    np.testing.assert_allclose(oracle.forward(ids).logits, expected, atol=2e-4)
    actions = random_actions(TOKENS, 6, policy.units)
    skipped = oracle.forward(ids, actions=actions).logits
    assert np.abs(skipped - expected).max() > 0.1
    for target, weights in (("cpu", "fp32"), ("portable", None)):
        name = build(bundle, target, weights=weights).target
        runtime = DashRuntime.load(bundle.root, name)
        np.testing.assert_allclose(runtime.session().logits(ids), expected, atol=2e-4, err_msg=name)
        np.testing.assert_allclose(runtime.session().logits(ids, actions=actions), skipped, atol=2e-4, err_msg=name)
        np.testing.assert_array_equal(runtime.generate(ids[:9], 20).tokens, greedy(model, ids[:9], 20), err_msg=name)


def greedy(model: Any, ids: np.ndarray, count: int) -> np.ndarray:
    """transformers' own generation, cache and all."""
    given = torch.from_numpy(ids)[None]
    out = model.generate(given, do_sample=False, max_new_tokens=count, min_new_tokens=count, pad_token_id=0)
    return out[0, len(ids) :].numpy()


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("case", ["llama-biases", "llama-odd-width", "qwen2", "qwen3"])
def test_quantised_family(case: str, precision: str, tmp_path: Path) -> None:
    """Small matrices of every kind survive the quantiser: int8 stays close, int4 (blocks as long as these matrices) in
    sight.
    """
    family, options = CASES[case]
    save_model(tmp_path / "model", family, **({"num_hidden_layers": 6} | options))
    checkpoint = open_checkpoint(tmp_path / "model")
    bundle = export(checkpoint, tmp_path / "tiny.dash", tiny_policy(checkpoint))
    exact = Oracle(checkpoint, tiny_policy(checkpoint)).forward(random_ids(TOKENS)).logits
    runtime = DashRuntime.load(bundle.root, build(bundle, "cpu", weights=precision).target)
    logits = runtime.session().logits(random_ids(TOKENS))
    error = np.sqrt(np.mean((logits - exact) ** 2)) / exact.std()
    assert error < {"int8": 0.12, "int4": 0.6}[precision], error


def test_heads_that_attention_does_not_take(tmp_path: Path) -> None:
    save_model(tmp_path / "model", "llama", num_hidden_layers=6, head_dim=12)
    checkpoint = open_checkpoint(tmp_path / "model")
    bundle = export(checkpoint, tmp_path / "tiny.dash", tiny_policy(checkpoint))
    with pytest.raises(BackendError, match="a multiple of 8, and this model's have 12: use --target portable"):
        build(bundle, "cpu", weights="fp32")
