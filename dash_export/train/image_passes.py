"""Dense passes of an image encoder, layer by layer, in ONNX Runtime: no torch is needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dash_export.backends.base import reference_engine
from dash_export.core.exits import gap
from dash_export.graphs.portable import encoder_graphs
from dash_export.graphs.portable.writer import save_graph
from dash_export.models.spec import EncoderCheckpoint, EncoderSpec

Floats = npt.NDArray[np.float32]


class ImageModel:
    """An encoder whose graphs lie in `folder`. States are float32 [n, tokens, hidden]."""

    def __init__(self, checkpoint: EncoderCheckpoint, folder: Path) -> None:
        self.spec: EncoderSpec = checkpoint.spec
        graphs = {
            f"layer_{layer:02d}": partial(encoder_graphs.layer_graph, checkpoint, layer)
            for layer in range(self.spec.num_layers)
        }
        graphs |= {name: partial(getattr(encoder_graphs, f"{name}_graph"), checkpoint) for name in ("embed", "head")}
        self._engines = {}
        for name, make in graphs.items():
            save_graph(make(), path := folder / f"{name}.onnx")
            self._engines[name] = reference_engine(path)

    def _run(self, name: str, inputs: Mapping[str, Floats]) -> dict[str, Floats]:
        return self._engines[name].run(inputs)

    def embed(self, pixels: Floats) -> Floats:
        """Return the state that enters layer 0, of pictures [n, 3, height, width]."""
        return self._run("embed", {"pixel_values": pixels})["hidden_out"]

    def states(self, pixels: Floats) -> Iterator[Floats]:
        """Yield the state that enters each layer, and the one after the last."""
        state = self.embed(pixels)
        yield state
        for layer in range(self.spec.num_layers):
            state = self._run(f"layer_{layer:02d}", {"hidden": state})["hidden_out"]
            yield state

    def head(self, state: Floats) -> dict[str, Floats]:
        """Return `pooled` [n, hidden], `states` and, of a classifier, `logits` [n, labels]."""
        return self._run("head", {"hidden": state})


def unit_normed(state: Floats, epsilon: float) -> Floats:
    """Return LayerNorm without gain and bias."""
    centred = state - state.mean(axis=-1, keepdims=True)
    found: Floats = centred / np.sqrt((centred * centred).mean(axis=-1, keepdims=True) + epsilon)
    return found


def divergence(dense: Floats, other: Floats) -> npt.NDArray[np.float64]:
    """Return 1 - cosine of pooled vectors [n, hidden], row by row."""
    return gap(dense.astype(np.float64), other.astype(np.float64)).astype(np.float64)
