"""Every portable graph of a model, whatever its kind: a kind of model is one line of MAKERS."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import onnx_ir as ir

from dash_export.bundle.records import DRAFTER
from dash_export.core.policy import SkipPolicy
from dash_export.graphs.portable import encoder_graphs, portable
from dash_export.graphs.portable.portable import EMBED_FILE
from dash_export.graphs.portable.stored import stored_tensors
from dash_export.graphs.portable.writer import save_graph, save_placed
from dash_export.models.spec import EMBED_WEIGHT, AnyCheckpoint, Checkpoint, EncoderCheckpoint


class Job(NamedTuple):
    """Files in `onnx/`: a graph of this name, or a table that several graphs read. `of_policy`: whether it depends on
    the policy. `write(folder)` returns the files written, the graph first.
    """

    name: str
    write: Callable[[Path], list[Path]]
    of_policy: bool = False
    is_graph: bool = True


def jobs(checkpoint: AnyCheckpoint, policy: SkipPolicy) -> Iterator[Job]:
    """Yield all that a bundle's `onnx/` holds."""
    graphs = MAKERS[type(checkpoint)]
    if checkpoint.spec.tables:
        yield Job("table", partial(_table, checkpoint), is_graph=False)
    yield _graph("embed", partial(graphs.embed_graph, checkpoint))
    for layer in range(checkpoint.spec.num_layers):
        yield _graph(f"layer_{layer:02d}", partial(graphs.layer_graph, checkpoint, layer))
    for place, unit in enumerate(policy.units):
        yield _graph(unit.bypass, partial(graphs.bypass_graph, checkpoint, policy, place), True)
    if policy.network is not None:
        yield _graph("policy", partial(graphs.policy_graph, checkpoint.spec, policy), True)
    if policy.drafter is not None:
        yield _graph(DRAFTER, partial(graphs.drafter_graph, checkpoint, policy.drafter), True)
    yield _graph("head", partial(graphs.head_graph, checkpoint))


def _graph(name: str, make: Callable[[], ir.Model], of_policy: bool = False) -> Job:
    return Job(name, lambda folder: save_graph(make(), folder / f"{name}.onnx", (EMBED_FILE,)), of_policy)


def _table(checkpoint: AnyCheckpoint, folder: Path) -> list[Path]:
    path = folder / EMBED_FILE
    _, tensors = stored_tensors(EMBED_WEIGHT, checkpoint.weights[EMBED_WEIGHT], transpose=False)
    save_placed(path, tensors)
    return [path]


MAKERS: dict[type[AnyCheckpoint], ModuleType] = {Checkpoint: portable, EncoderCheckpoint: encoder_graphs}
"""Checkpoint of a kind of model -> the module that makes its graphs: `embed_graph`, `layer_graph`, `bypass_graph`,
`policy_graph` and `head_graph`.
"""
