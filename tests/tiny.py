"""Tiny random models whose logits depend visibly on everything, and the bundles made of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dash_export.builders import build
from dash_export.exporting import export
from dash_export.models import Checkpoint, open_checkpoint
from dash_export.skip_policy import Compensation, SkipPolicy, untrained_policy
from tests.models.helpers import DIMENSIONS, FAMILIES, tiny_tokenizer

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_model(folder: Path, family: str = "llama", **options: Any) -> Any:
    """A random model of `family` with a tokenizer and a chat template; 6 layers unless said otherwise. Returns the
    transformers model.
    """
    config_class, model_class = FAMILIES[family]
    torch.manual_seed(0)
    model = model_class(config_class(**(DIMENSIONS | {"num_hidden_layers": 6} | options))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            # Gains near one and matrices that keep the scale: attention is far from uniform and no layer is lost in
            # another's noise.
            parameter.copy_(1 + 0.2 * noise if "norm" in name else 0.17 * noise)
    model.save_pretrained(folder)
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return model


def tiny_checkpoint(folder: Path, family: str = "llama", **options: Any) -> Checkpoint:
    save_model(folder, family, **options)
    return open_checkpoint(folder)


def with_compensation(policy: SkipPolicy, hidden: int, kind: str, seed: int = 1) -> SkipPolicy:
    """The policy with random compensation weights, large enough that leaving them out shows."""
    rng = np.random.default_rng(seed)
    count, rank = len(policy.gated), 4

    def normal(*shape: int, scale: float) -> np.ndarray:
        return (rng.standard_normal(shape) * scale).astype(np.float32)

    weights = {
        "none": {},
        "scale": {"factor": normal(count, scale=0.3)},
        "low_rank": {"down": normal(count, hidden, rank, scale=0.1), "up": normal(count, rank, hidden, scale=0.3)},
    }[kind]
    return replace(policy, compensation=Compensation(kind, weights))


def tiny_policy(checkpoint: Checkpoint, kind: str = "none", seed: int = 0, width: int = 16) -> SkipPolicy:
    """Untrained, with orders as training would rank them."""
    policy = untrained_policy(checkpoint.spec, width=width, seed=seed)
    gated = policy.gated
    ranked = replace(policy, static_order=gated[1:] + gated[:1], cosine_order=gated[::-1])
    return with_compensation(ranked, checkpoint.spec.hidden_size, kind)


def tiny_bundle(root: Path, *targets: str, kind: str = "none", weights: str = "fp32", **options: Any) -> Path:
    """Export a tiny model under `root` and build it for `targets` (`cpu` at `weights`, `portable`). Returns the
    bundle.
    """
    checkpoint = tiny_checkpoint(root / "model", **options)
    bundle = export(checkpoint, root / "tiny.dash", tiny_policy(checkpoint, kind))
    for target in targets:
        build(bundle, target, weights=weights if target == "cpu" else None)
    return bundle.root


def stretched_bundle(root: Path, gated: tuple[int, ...] = (2, 3, 4, 5, 6, 8, 9), **options: Any) -> Path:
    """A bundle of ten layers whose policy decides about all of `gated` by what enters layer 1, built for `cpu-fp32`:
    neighbours are engines of several layers too. Returns it.
    """
    model = save_model(root / "model", num_hidden_layers=10, **options)
    with torch.no_grad():
        # Too small to be divided by: this layer's compensation has a norm of its own, beside that of K and V.
        model.model.layers[gated[2]].input_layernorm.weight[3] = 1e-3
    model.save_pretrained(root / "model")
    checkpoint = open_checkpoint(root / "model")
    policy = replace(untrained_policy(checkpoint.spec, gated, width=0), reads=(1,) * len(gated))
    policy = replace(policy, static_order=gated[::-1], cosine_order=gated)
    bundle = export(
        checkpoint, root / "stretched.dash", with_compensation(policy, checkpoint.spec.hidden_size, "low_rank")
    )
    build(bundle, "cpu", weights="fp32")
    return bundle.root


def random_ids(count: int, vocab: int = 300, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab, count).astype(np.int64)


def random_actions(tokens: int, layers: int, gated: tuple[int, ...], seed: int = 0, share: float = 0.4) -> np.ndarray:
    """Random per-token, per-layer actions as decode could take them: gated layers only, the first two positions
    dense.
    """
    actions = np.zeros((tokens, layers), np.int8)
    actions[2:, list(gated)] = np.random.default_rng(seed).random((tokens - 2, len(gated))) < share
    return actions
