"""Every portable graph of a model, whatever its kind: a kind of model is one line of MAKERS."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import onnx_ir as ir

from dash_export.core.policy import SkipPolicy
from dash_export.graphs.portable import encoder_graphs, portable
from dash_export.graphs.portable.stored import stored_tensors
from dash_export.graphs.portable.writer import save_graph, save_placed
from dash_export.models.spec import AnyCheckpoint, Checkpoint, EncoderCheckpoint


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
    yield from MAKERS[type(checkpoint)](checkpoint, policy)


def _graph(name: str, make: Callable[[], ir.Model], of_policy: bool = False, shared: tuple[str, ...] = ()) -> Job:
    return Job(name, lambda folder: save_graph(make(), folder / f"{name}.onnx", shared), of_policy)


def _decoder(checkpoint: Checkpoint, policy: SkipPolicy) -> Iterator[Job]:
    spec, graph = checkpoint.spec, partial(_graph, shared=(portable.EMBED_FILE,))

    def table(folder: Path) -> list[Path]:
        path = folder / portable.EMBED_FILE
        _, tensors = stored_tensors(portable.EMBED_WEIGHT, checkpoint.weights[portable.EMBED_WEIGHT], transpose=False)
        save_placed(path, tensors)
        return [path]

    yield Job("table", table, is_graph=False)
    yield graph("embed", partial(portable.embed_graph, checkpoint))
    for layer in range(spec.num_layers):
        yield graph(f"layer_{layer:02d}", partial(portable.layer_graph, checkpoint, layer))
    for unit, bypass in zip(policy.units, policy.bypasses, strict=True):
        yield graph(unit.bypass, partial(portable.bypass_graph, checkpoint, unit, bypass), True)
    if policy.network is not None:
        yield graph("policy", partial(portable.policy_graph, spec, policy), True)
    yield graph("head", partial(portable.head_graph, checkpoint))


def _encoder(checkpoint: EncoderCheckpoint, policy: SkipPolicy) -> Iterator[Job]:
    spec = checkpoint.spec
    yield _graph("embed", partial(encoder_graphs.embed_graph, checkpoint))
    for layer in range(spec.num_layers):
        yield _graph(f"layer_{layer:02d}", partial(encoder_graphs.layer_graph, checkpoint, layer))
    for unit, bypass in zip(policy.units, policy.bypasses, strict=True):
        yield _graph(unit.bypass, partial(encoder_graphs.bypass_graph, spec, unit, bypass), True)
    if policy.network is not None:
        yield _graph("policy", partial(encoder_graphs.policy_graph, spec, policy), True)
    yield _graph("head", partial(encoder_graphs.head_graph, checkpoint))


MAKERS: dict[type[AnyCheckpoint], Callable[[Any, SkipPolicy], Iterator[Job]]] = {
    Checkpoint: _decoder,
    EncoderCheckpoint: _encoder,
}
