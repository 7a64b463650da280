"""Single steps of a bundle's graph or engine file in ONNX Runtime on a CPU, and the inputs of a step."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dash_export.backends.base import reference_engine
from dash_export.bundle.bundle import Bundle
from dash_export.bundle.layout import new_names, present_names, short_name
from dash_export.core.facts import DecoderFacts, rope_tables
from dash_export.files.resources import resource_folder
from dash_export.text.tokenizer import Text

Arrays = dict[str, npt.NDArray[Any]]
Run = Callable[[Mapping[str, npt.NDArray[Any]]], Arrays]
"""One engine or graph: inputs by name -> outputs by name."""

_CHARACTERS = 2000


def text_ids(bundle: Bundle, count: int) -> npt.NDArray[np.int64]:
    """Return the first `count` token ids of the shipped prose, which is repeated where it is too short."""
    text = (resource_folder("calibration") / "prose.txt").read_text(encoding="utf-8")
    ids = Text(bundle.root).encode(text[: max(_CHARACTERS, 8 * count)])
    return np.resize(np.array(ids, np.int64), count)


def step_inputs(model: DecoderFacts, start: int, count: int, capacity: int) -> Arrays:
    """Return the inputs that say where `count` tokens go after `start` cached ones, in a cache of `capacity` rows: all
    that graphs and engines of any dialect take beside states, actions and caches.
    """
    positions = np.arange(start, start + count)
    mask = np.arange(capacity)[None, :] <= positions[:, None]
    return {
        "position_ids": positions[None],
        "write_indices": np.array([start]),
        "attention_mask": mask[None, None],
        "seqlens_k": np.array([start + count - 1], np.int32),
        "total_length": np.array([start + count], np.int32),
        "first_logit": np.array([count - 1]),
        **rope_tables(model, capacity),
    }


def graph_run(path: Path, *, own_threads: bool = False) -> Run:
    """Load a graph into ONNX Runtime on the CPU, and return the function that runs it. The function ignores inputs that
    the graph does not have, and converts the others to the graph's types and ranks.

    ONNX Runtime has either one thread pool for the process or one per session: give `own_threads` where other sessions
    in this process have pools of their own. Raises BackendError when ONNX Runtime refuses the graph.
    """
    # Between runs numpy computes: the engine's threads must not spin on its cores meanwhile.
    engine = reference_engine(path, own_threads, spins=False)
    types = {"tensor(float16)": np.float16, "tensor(float)": np.float32}

    def run(inputs: Mapping[str, npt.NDArray[Any]]) -> Arrays:
        short = {short_name(name): array for name, array in inputs.items()}
        feeds = {}
        for item in engine.session.get_inputs():
            array = inputs[item.name] if item.name in inputs else short[item.name]
            # A lowered graph may take rows where others take [batch, sequence]: drop the leading axis, which is 1.
            array = array.reshape(array.shape[max(0, array.ndim - len(item.shape)) :])
            feeds[item.name] = array.astype(types.get(item.type, array.dtype), copy=False)
        found = engine.run(feeds)
        for past in inputs:
            if past.startswith("past_key_values."):
                for name in ("present", "new"):
                    full = past.replace("past_key_values", name)
                    if short_name(full) in found:
                        found[full] = found.pop(short_name(full))
        return found

    return run


def cached_step(run: Run, inputs: Arrays, cache: Arrays, start: int, count: int, head_dim: int) -> Arrays:
    """Run one step, write its new rows into `cache`, and return them all as `K/V` with the other outputs."""
    found, written = run(inputs | cache), []
    for past in cache:
        layer, which = past.split(".")[1:]
        index = ("key", "value").index(which)
        present, new = (names(int(layer))[index] for names in (present_names, new_names))
        rows = found.pop(new) if new in found else found.pop(present)[:, :, start : start + count]
        if rows.ndim == 3:  # from a bypass in the `ort` dialect: all heads of a token side by side
            rows = rows.reshape(1, count, -1, head_dim).swapaxes(1, 2)
        cache[past][:, :, start : start + count] = rows.astype(np.float32)
        written.append(cache[past][:, :, start : start + count].copy())
    return found | ({"K/V": np.stack(written)} if written else {})
