"""What `polygraphy run --dash` feeds: real text, and the states it has where an engine begins. Random numbers, which
Polygraphy would take, are no positions, masks or hidden states.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dash_export.bundle import Bundle
from dash_export.errors import RequestError
from dash_export.graph_runs import Arrays, graph_run, step_inputs, text_ids
from dash_export.names import past_names, present_names
from dash_export.polygraphy.engines import find_engine
from dash_export.polygraphy.errors import told_by_polygraphy

STEPS = 16
"""Different steps of a text; with more iterations they come again."""


class StepInputs:
    """`input_ids` [1, context + tokens] for whole steps: windows of a text, one per iteration."""

    def __init__(self, bundle: str, tokens: int, context: int, iterations: int) -> None:
        self._stride = tokens
        self._iterations = iterations
        with told_by_polygraphy():
            opened = Bundle.open(bundle)
            self._length = _checked_length(opened, tokens, context)
            self._ids = text_ids(opened, self._length + (STEPS - 1) * tokens)

    def __len__(self) -> int:
        return self._iterations

    def __getitem__(self, index: int) -> dict[str, npt.NDArray[np.int64]]:
        if not 0 <= index < self._iterations:
            raise IndexError(index)
        start = index % STEPS * self._stride
        return {"input_ids": self._ids[None, start : start + self._length]}


class EngineInputs:
    """The steps of a text as one engine and its portable graph see them: the same text, one step further per
    iteration, over a cache of one capacity. A dictionary has what any of the two may want.

    States and caches come from the portable graphs of the layers before, run once over the whole text.
    """

    def __init__(self, bundle: str, target: str, engine: str, tokens: int, context: int, iterations: int) -> None:
        self._tokens, self._context, self._iterations = tokens, context, iterations
        with told_by_polygraphy():
            opened = Bundle.open(bundle)
            self._facts = find_engine(opened, opened.load_build(target), engine)
            _checked_length(opened, tokens, context)
            room = (opened.manifest.model.max_positions - context) // tokens
            self._steps = min(STEPS, iterations, room)
            self._length = context + tokens * self._steps
            self._ids = text_ids(opened, self._length)[None]
            self._states, self._caches = self._walk(opened)

    def _walk(self, bundle: Bundle) -> tuple[npt.NDArray[np.float32], Arrays]:
        """The hidden states [1, length, hidden] that enter the engine, and the caches of its layers."""
        begin, end = self._facts.segment.first, self._facts.segment.last + 1
        places = step_inputs(0, self._length, self._length)
        hidden = graph_run(bundle.graph("embed"), own_threads=True)({"input_ids": self._ids})["hidden_out"]
        states, model = hidden, bundle.manifest.model
        caches: Arrays = {}
        empty = np.zeros((1, model.num_kv_heads, self._length, model.head_dim), np.float32)
        for layer in range(end):
            states = hidden if layer == begin else states
            run = graph_run(bundle.graph(f"layer_{layer:02d}"), own_threads=True)
            found = run(places | {"hidden": hidden} | dict.fromkeys(past_names(layer), empty))
            hidden = found["hidden_out"]
            if layer >= begin:
                caches |= dict(zip(past_names(layer), (found[name] for name in present_names(layer)), strict=True))
        return hidden if end == begin else states, caches

    def __len__(self) -> int:
        return self._iterations

    def __getitem__(self, index: int) -> Arrays:
        if not 0 <= index < self._iterations:
            raise IndexError(index)
        start = self._context + index % self._steps * self._tokens
        step = slice(start, start + self._tokens)
        caches = {name: array.copy() for name, array in self._caches.items()}
        for array in caches.values():
            array[:, :, start:] = 0
        inputs = step_inputs(start, self._tokens, self._length) | {
            "input_ids": self._ids[:, step],
            "hidden": self._states[:, step],
        }
        return inputs | caches


def _checked_length(bundle: Bundle, tokens: int, context: int) -> int:
    """Tokens of one step and its context. Raises RequestError when the model has not that many positions."""
    length, positions = context + tokens, bundle.manifest.model.max_positions
    if tokens < 1 or context < 0 or length > positions:
        raise RequestError(
            f"--dash-tokens {tokens} after --dash-context {context} cannot be: at least 1 and 0, and together no more "
            f"than the model's {positions} positions."
        )
    return length
