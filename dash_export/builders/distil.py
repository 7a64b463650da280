"""Scales of int4 weights tuned by distillation (torch), as mlx-lm's DWQ and the last stage of EfficientQAT
(arXiv 2407.11062) do it.

GPTQ looks at one matrix at a time. Here the codes stay as it chose them, and all scales together learn to give the
unrounded model's next-token distribution: KL(exact || rounded), over text that is read once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers

from dash_export.artifacts import Progress
from dash_export.bundle import Bundle
from dash_export.errors import BundleError
from dash_export.graphs.compose import constant_value, load_graph
from dash_export.graphs.rounded import Rounded
from dash_export.models.spec import Float32Array
from dash_export.models.torch_model import torch_model
from dash_export.runtime.cpus import physical_cores

WINDOWS_AT_ONCE = 4
RATE = 2e-3
"""Of the scales' relative change. At 5e-3 the divergence was rising by step 40 (SmolLM2-135M)."""
WARM_UP = 0.1
ROWS = 256
"""Positions whose logits are in memory at a time."""
_MATRIX = re.compile(r"_proj\.weight|update_\d+\.weight")


def distilled(
    bundle: Bundle, rounded: Mapping[str, Rounded], windows: npt.NDArray[np.int64], progress: Progress
) -> dict[str, Rounded]:
    """`rounded` matrices, by the names of their nodes in the bundle's portable graphs, with tuned scales.

    `windows`: token ids [windows, tokens], each used once. Raises BundleError when the bundle's config is not that of
    its weights.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(physical_cores())
    try:
        return _distilled(bundle, rounded, windows, progress)
    finally:
        torch.set_num_threads(before)


def _distilled(
    bundle: Bundle, rounded: Mapping[str, Rounded], windows: npt.NDArray[np.int64], progress: Progress
) -> dict[str, Rounded]:
    model = _exact_model(bundle)
    student = _Student(model, rounded)
    steps = len(windows) // WINDOWS_AT_ONCE
    optimizer = torch.optim.Adam(student.parameters(), lr=RATE, betas=(0.9, 0.95))
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, int(WARM_UP * steps), steps)
    order = np.random.default_rng(0).permutation(len(windows))[: steps * WINDOWS_AT_ONCE]
    for step, chosen in enumerate(order.reshape(steps, WINDOWS_AT_ONCE), 1):
        optimizer.zero_grad()
        student.learn(torch.from_numpy(windows[chosen]))
        optimizer.step()
        schedule.step()
        progress("tuning the scales", step, steps)
    return {node: replace(rounded[node], scales=layer.scales()) for node, layer in student.layers.items()}


def _exact_model(bundle: Bundle) -> Any:
    """The unrounded model, its weights from the portable graphs, in bfloat16."""
    weights: dict[str, Float32Array] = {}
    for name in ("embed", *(f"layer_{layer:02d}" for layer in range(bundle.manifest.model.num_layers)), "head"):
        for key, value in load_graph(bundle.graph(name)).graph.initializers.items():
            array = constant_value(value)
            if array is not None and key.startswith(("model.", "lm_head.")):
                # A graph multiplies from the left: [in, out].
                weights[key] = np.array(array.T if _MATRIX.search(key) else array, order="C")
    try:
        config = json.loads(bundle.path("config.json").read_text(encoding="utf-8"))
        return torch_model(config, weights, torch.bfloat16)
    except Exception as error:  # a config from outside; transformers raises many kinds
        raise BundleError(
            f"{bundle.root}: config.json does not describe the bundle's weights ({error}). Export the model again."
        ) from error


class _Student:
    """One model that can be both: exact, or with its matrices rounded."""

    def __init__(self, model: Any, rounded: Mapping[str, Rounded]) -> None:
        self.model = model
        self.layers: dict[str, _RoundedLinear] = {}
        for node, matrix in rounded.items():
            name = _module_name(node)
            layer = _RoundedLinear(model.get_submodule(name), matrix)
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, layer)
            self.layers[node] = layer

    def parameters(self) -> list[torch.nn.Parameter]:
        return [layer.stretch for layer in self.layers.values()]

    def learn(self, ids: torch.Tensor) -> float:
        """Add the gradient of the mean KL over ids [windows, tokens] to the parameters; returns that KL, in nats."""
        with torch.no_grad(), self._exact():
            wanted = self._states(ids)
        found = self._states(ids)
        head = self.model.lm_head
        weight = head.weight_now() if isinstance(head, _RoundedLinear) else head.weight
        exact = head.exact.weight if isinstance(head, _RoundedLinear) else head.weight
        # The vocabulary's gradient is made piece by piece, so that the logits of all positions are never there at once.
        leaves = [value.detach().requires_grad_() for value in (found, weight)]
        total = 0.0
        for start in range(0, len(found), ROWS):
            rows = slice(start, start + ROWS)
            with torch.no_grad():
                target = torch.nn.functional.linear(wanted[rows], exact).float().log_softmax(-1)
            guess = torch.nn.functional.linear(leaves[0][rows], leaves[1]).float().log_softmax(-1)
            loss = torch.nn.functional.kl_div(guess, target, reduction="sum", log_target=True) / len(found)
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        pairs = [(value, leaf.grad) for value, leaf in zip((found, weight), leaves, strict=True) if value.requires_grad]
        torch.autograd.backward([value for value, _ in pairs], [gradient for _, gradient in pairs])
        return total

    def _states(self, ids: torch.Tensor) -> torch.Tensor:
        """Normed last hidden states [windows * tokens, hidden]."""
        final: torch.Tensor = self.model.model(ids, use_cache=False).last_hidden_state
        return final.flatten(0, 1)

    @contextmanager
    def _exact(self) -> Iterator[None]:
        for layer in self.layers.values():
            layer.rounds = False
        try:
            yield
        finally:
            for layer in self.layers.values():
                layer.rounds = True


class _RoundedLinear(torch.nn.Module):
    """A linear layer, and the same with its matrix rounded: weight = steps * scale * (1 + stretch)."""

    def __init__(self, exact: torch.nn.Linear, rounded: Rounded) -> None:
        super().__init__()
        self.exact, self.rounds, self._rounded = exact, True, rounded
        blocks = len(rounded.scales)
        rows = np.arange(len(rounded.codes)) // rounded.block
        steps = rounded.codes.astype(np.int8) - rounded.zeros.astype(np.int8)[rows]
        padded = np.pad(steps, ((0, blocks * rounded.block - len(steps)), (0, 0)))
        self._steps = torch.from_numpy(padded.T.copy()).reshape(-1, blocks, rounded.block)
        self._scales = torch.from_numpy(rounded.scales.T.copy())
        self.stretch = torch.nn.Parameter(torch.zeros_like(self._scales))

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        if not self.rounds:
            found: torch.Tensor = self.exact(value)
            return found
        return torch.nn.functional.linear(value, self.weight_now(), self.exact.bias)

    def weight_now(self) -> torch.Tensor:
        """[out, in]"""
        dequantize: Callable[..., torch.Tensor] = _Dequantize.apply
        weight = dequantize(self._steps, self._scales * (1 + self.stretch), self.exact.weight.dtype)
        return weight.flatten(1)[:, : len(self._rounded.codes)]

    def scales(self) -> npt.NDArray[np.float32]:
        """As a `Rounded` has them."""
        found: npt.NDArray[np.float32] = (self._scales * (1 + self.stretch)).detach().numpy().T.copy()
        return found


class _Dequantize(torch.autograd.Function):
    """steps [out, blocks, block] int8 * scales [out, blocks]; keeps the steps for the way back, not their product."""

    @staticmethod
    def forward(ctx: Any, steps: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        ctx.save_for_backward(steps)
        return (steps * scales[..., None]).to(dtype)

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[None, torch.Tensor, None]:
        (steps,) = ctx.saved_tensors
        return None, (upstream[0].float() * steps).sum(-1), None


def _module_name(node: str) -> str:
    """`layer_07/attention/o_proj` -> `model.layers.7.self_attn.o_proj`, `head/logits` -> `lm_head`."""
    if node == "head/logits":
        return "lm_head"
    layer, part, name = node.split("/")
    return f"model.layers.{int(layer.removeprefix('layer_'))}.{part.replace('attention', 'self_attn')}.{name}"
