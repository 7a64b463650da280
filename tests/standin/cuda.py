"""CUDA's runtime and driver API without a card, by the rules of its documentation: streams and events
(ordered_streams.py), and here graphs and kernels. Types and enumerations are the installed bindings' own.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import cuda.bindings.runtime as rt

from tests.standin.memory import OK, rule
from tests.standin.ordered_streams import Call, Graph, Node, Streams
from tests.standin.ptx import kernels


class Card(Streams):
    """A GPU of the stand-in."""

    # --- graphs

    def cudaStreamBeginCapture(self, stream: int, mode: Any) -> tuple[Any]:  # noqa: N802
        assert mode == rt.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed
        return self._begin(stream, self._graph([]))

    def cudaStreamBeginCaptureToGraph(  # noqa: N802
        self, stream: int, graph: Any, before: Any, edges: Any, many: int, mode: Any
    ) -> tuple[Any]:
        assert (before, edges, many) == (None, None, 0)
        assert mode == rt.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed
        return self._begin(stream, self._graphs[int(graph)])

    def _graph(self, log: list[Call]) -> Graph:
        graph = Graph(next(self._handles), log)
        self._graphs[graph.handle] = graph
        return graph

    def _begin(self, stream: int, graph: Graph) -> tuple[Any]:
        rule(stream not in self._recording, "cudaErrorIllegalState: the stream is recorded already")
        graph.origin, graph.ends[stream], self._recording[stream] = stream, [], graph
        return (OK,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[Any, ...]:  # noqa: N802
        graph = self._recording[stream]
        rule(graph.origin == stream, "cudaErrorStreamCaptureUnmatched: begun in another stream")
        joined, found = list(graph.ends[stream]), set[int]()
        while joined:
            node = joined.pop()
            if id(node) not in found:
                found.add(id(node))
                joined += node.before
        self._recording = {each: at for each, at in self._recording.items() if at is not graph}
        if graph.broken:
            return rt.cudaError_t.cudaErrorStreamCaptureInvalidated, None
        lost = {str(self.names().get(node.stream)) for node in graph.nodes if id(node) not in found}
        rule(not lost, f"cudaErrorStreamCaptureUnjoined: nobody waits for the end of {', '.join(lost)}")
        return OK, rt.cudaGraph_t(graph.handle)

    def cudaStreamGetCaptureInfo(self, stream: int) -> tuple[Any, ...]:  # noqa: N802
        graph = self._recording[stream]
        before = []
        for node in graph.ends[stream]:
            before.append(rt.cudaGraphNode_t(next(self._handles)))
            self._nodes[int(before[-1])] = node
        status = rt.cudaStreamCaptureStatus.cudaStreamCaptureStatusActive
        edges = [rt.cudaGraphEdgeData() for _ in before]
        return OK, status, graph.handle, rt.cudaGraph_t(graph.handle), before, edges, len(before)

    def cudaStreamUpdateCaptureDependencies(  # noqa: N802
        self, stream: int, nodes: Sequence[Any], edges: Sequence[Any], many: int, flags: Any
    ) -> tuple[Any]:
        assert flags == rt.cudaStreamUpdateCaptureDependenciesFlags.cudaStreamSetCaptureDependencies
        assert len(nodes) == len(edges) == many
        self._recording[stream].ends[stream] = [self._nodes[int(node)] for node in nodes]
        return (OK,)

    def cudaGraphConditionalHandleCreate(self, graph: Any, default: int, flags: int) -> tuple[Any, ...]:  # noqa: N802
        assert (default, flags) == (0, 0)
        handle = next(self._handles) << 32  # as wide as they may be
        self._owners[handle] = self._graphs[int(graph)]
        return OK, rt.cudaGraphConditionalHandle(handle)

    def cudaGraphAddNode(  # noqa: N802
        self, graph: Any, before: Sequence[Any], edges: Sequence[Any], many: int, params: Any
    ) -> tuple[Any, ...]:
        assert isinstance(params, rt.cudaGraphNodeParams)
        assert params.type == rt.cudaGraphNodeType.cudaGraphNodeTypeConditional
        asked, at = params.conditional, self._graphs[int(graph)]
        assert (asked.type, asked.size) == (rt.cudaGraphConditionalNodeType.cudaGraphCondTypeIf, 1)
        assert len(before) == len(edges) == many
        handle = int(asked.handle)
        rule(self._owners.pop(handle, None) is at, "cudaErrorInvalidValue: a handle of one node of its own graph")
        body = self._graph(at.log)

        def act() -> None:
            rule(handle in self._conditions, "a branch before its decision")
            if self._conditions[handle]:
                nodes = self._copied(body, [])
                self.run(list(nodes), nodes)

        node = Node(at.origin, act, [self._nodes[int(each)] for each in before])
        at.nodes.append(node)
        at.log.append((at.origin, "branch", ""))
        # As CUDA gives it: in an array of its own, whose address it leaves in the parameters.
        node.made = (ctypes.c_void_p * 1)(body.handle)  # type: ignore[attr-defined]
        (ctypes.c_uint64 * 3).from_address(asked.getPtr())[2] = ctypes.addressof(node.made)  # type: ignore[attr-defined]
        found = rt.cudaGraphNode_t(next(self._handles))
        self._nodes[int(found)] = node
        return OK, found

    def cudaGraphInstantiate(self, graph: Any, flags: int) -> tuple[Any, ...]:  # noqa: N802
        assert flags == rt.cudaGraphInstantiateFlags.cudaGraphInstantiateFlagUseNodePriority
        made = next(self._handles)
        self._graphs[made] = self._graphs[int(graph)]
        self.recorded.append(self._graphs[made])
        return OK, rt.cudaGraphExec_t(made)

    def cudaGraphLaunch(self, graph: Any, stream: int) -> tuple[Any]:  # noqa: N802
        rule(stream not in self._recording, "cudaErrorStreamCaptureUnsupported: a graph launched in a recording")
        """Its nodes run as its own streams ran when it was recorded, between what other streams do."""
        found = self._graphs[int(graph)]
        names = [of for _, what, of in found.log if what == "run"]
        self.enqueue(stream, "launch", names[0] if len(names) == 1 else "graph", self._conditions.clear)
        begun = self.live.ends[int(stream)]
        nodes = self._copied(found, begun)
        self.live.nodes += nodes
        followed = {id(before) for node in nodes for before in node.before}
        self.live.ends[int(stream)] = [node for node in nodes if id(node) not in followed] or begun
        return (OK,)

    def _copied(self, graph: Graph, begun: list[Node]) -> list[Node]:
        copies: dict[int, Node] = {}
        for node in graph.nodes:
            copies[id(node)] = Node(node.stream, node.act, [copies[id(each)] for each in node.before] or begun)
        return list(copies.values())

    def cudaGraphDestroy(self, graph: Any) -> tuple[Any]:  # noqa: N802
        del self._graphs[int(graph)]
        return (OK,)

    cudaGraphExecDestroy = cudaGraphDestroy  # noqa: N815

    # --- kernels

    def load(self, code: bytes) -> tuple[Any, ...]:
        rule(not self.recording(), "drivers before CUDA 12.3 load no kernels within a recording")
        return rt.cudaError_t(0), kernels(code.rstrip(b"\0").decode())

    def function(self, module: dict[str, Any], name: bytes) -> tuple[Any, ...]:
        handle = next(self._handles)
        self._functions[handle] = name.decode(), module[name.decode()]
        return rt.cudaError_t(0), handle

    def launch_kernel(self, function: int, *given: Any) -> tuple[Any]:
        blocks, by, bz, threads, ty, tz, shared, stream, (values, types), extra = given
        assert (ty, tz, shared, extra) == (1, 1, 0, 0)
        self.calls["cuLaunchKernel"] += 1
        name, kernel = self._functions[function]
        arguments = [kind(value).value for kind, value in zip(types, values, strict=True)]

        def act() -> None:
            kernel.run(
                self.view,
                (blocks, by, bz),
                threads,
                arguments,
                lambda at, value: self._conditions.update({at: bool(value)}),
            )

        self.enqueue(stream, name, "", act)
        return (rt.cudaError_t(0),)

    # --- the rest

    def cudaSetDevice(self, index: int) -> tuple[Any]:  # noqa: N802
        assert index == 0
        return (OK,)

    def cudaSetDeviceFlags(self, flags: int) -> tuple[Any]:  # noqa: N802
        assert self.integrated
        assert flags == rt.cudaDeviceScheduleSpin
        return (OK,)

    def cudaDriverGetVersion(self) -> tuple[Any, ...]:  # noqa: N802
        return OK, self.version

    def cudaGetLastError(self) -> tuple[Any]:  # noqa: N802
        return (OK,)

    def cudaGetErrorString(self, code: Any) -> tuple[Any, ...]:  # noqa: N802
        return OK, code.name.encode()
