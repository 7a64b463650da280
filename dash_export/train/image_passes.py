"""Passes of an image encoder, layer by layer, dense or with units skipped, in ONNX Runtime: no torch is needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dash_export.backends.onnxruntime.ort_engine import OrtEngine, session_options
from dash_export.core.policy import Weights, half
from dash_export.core.units import Unit
from dash_export.graphs.portable import encoder_graphs
from dash_export.graphs.portable.writer import save_graph
from dash_export.models.spec import EncoderCheckpoint, EncoderSpec

Floats = npt.NDArray[np.float32]


class ImageModel:
    """An encoder whose graphs lie in `folder`. States are float32 [n, tokens, hidden]."""

    def __init__(self, checkpoint: EncoderCheckpoint, folder: Path) -> None:
        self.spec: EncoderSpec = checkpoint.spec
        graphs = {
            "embed": partial(encoder_graphs.embed_graph, checkpoint),
            "head": partial(encoder_graphs.head_graph, checkpoint),
            **{
                f"layer_{layer:02d}": partial(encoder_graphs.layer_graph, checkpoint, layer)
                for layer in range(self.spec.num_layers)
            },
        }
        options = session_options()
        self._engines = {}
        for name, make in graphs.items():
            path = folder / f"{name}.onnx"
            save_graph(make(), path)
            self._engines[name] = OrtEngine(path, options)

    def _run(self, name: str, inputs: Mapping[str, Floats]) -> dict[str, Floats]:
        engine = self._engines[name]
        return dict(zip(engine.outputs, engine.session.run(None, inputs), strict=True))

    def embed(self, pixels: Floats) -> Floats:
        """Return the state that enters layer 0, of pictures [n, 3, height, width]."""
        return self._run("embed", {"pixel_values": pixels})["hidden_out"]

    def layers(self, state: Floats, layers: Sequence[int]) -> Floats:
        """Run layers, one after the other."""
        for layer in layers:
            state = self._run(f"layer_{layer:02d}", {"hidden": state})["hidden_out"]
        return state

    def states(self, pixels: Floats) -> Iterator[Floats]:
        """Yield the state that enters each layer, and the one after the last."""
        state = self.embed(pixels)
        yield state
        for layer in range(self.spec.num_layers):
            state = self.layers(state, [layer])
            yield state

    def head(self, state: Floats) -> dict[str, Floats]:
        """Return `pooled` [n, hidden], `states` and, of a classifier, `logits` [n, labels]."""
        return self._run("head", {"hidden": state})

    def skip(self, state: Floats, bypass: Weights) -> Floats:
        """Return the state after a skipped unit."""
        read, special = unit_normed(state, self.spec.norm_eps), self.spec.special
        update = np.empty_like(state)
        update[:, special:] = read[:, special:] @ half(bypass["weight"]) + bypass["bias"]
        if special:
            update[:, :special] = read[:, :special] @ half(bypass["special.weight"]) + bypass["special.bias"]
        return state + update


def unit_normed(state: Floats, epsilon: float) -> Floats:
    """Return LayerNorm without gain and bias: what a bypass and the policy read of a state."""
    centred = state - state.mean(axis=-1, keepdims=True)
    found: Floats = centred / np.sqrt((centred * centred).mean(axis=-1, keepdims=True) + epsilon)
    return found


def divergence(dense: Floats, other: Floats) -> npt.NDArray[np.float64]:
    """Return 1 - cosine of pooled vectors [n, hidden], row by row."""
    left, right = dense.astype(np.float64), other.astype(np.float64)
    lengths = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    found: npt.NDArray[np.float64] = 1 - (left * right).sum(axis=1) / np.maximum(lengths, 1e-12)
    return found


class Regression:
    """Ridge regression of a unit's update on what its bypass reads, from sums: memory does not grow with pictures."""

    RIDGE = 1e-3
    """Ridge per token, relative to the mean square of the inputs."""

    def __init__(self, spec: EncoderSpec) -> None:
        self._special, size = spec.special, spec.hidden_size + 1
        self._sums = {part: (np.zeros((size, size)), np.zeros((size, size - 1))) for part in ("", "special.")}

    def add(self, read: Floats, update: Floats) -> None:
        """Add what a bypass reads, and what it should give, [n, tokens, hidden]."""
        for part, tokens in (("", slice(self._special, None)), ("special.", slice(0, self._special))):
            x = read[:, tokens].reshape(-1, read.shape[-1])
            if len(x):
                x = np.concatenate([x, np.ones((len(x), 1), np.float32)], axis=1)
                xx, xy = self._sums[part]
                xx += x.T @ x
                xy += x.T @ update[:, tokens].reshape(-1, update.shape[-1])

    def solved(self) -> dict[str, Floats]:
        """Return the bypass."""
        found: dict[str, Floats] = {}
        for part, (xx, xy) in self._sums.items():
            if not xx.any():
                continue
            ridge = self.RIDGE * xx.diagonal()[:-1].mean() * np.eye(len(xx))
            ridge[-1, -1] = 0
            weight = np.linalg.solve(xx + ridge, xy).astype(np.float32)
            found |= {f"{part}weight": weight[:-1].copy(), f"{part}bias": weight[-1].copy()}
        return found


def unit_candidates(num_layers: int, first: int, longest: int) -> list[Unit]:
    """Return all units of up to `longest` layers from layer `first` on. The last layer may be in one: a bypass gives
    the pooled vector as well as a layer does.
    """
    return [Unit(a, a + size - 1) for size in range(1, longest + 1) for a in range(first, num_layers - size + 1)]
