"""ONNX Runtime on a CPU: lowered .onnx files whose weights are mapped from disk, or the portable graphs as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from dash_export.backends.base import load_backend
from dash_export.backends.host.cpus import available_memory, cpu_name, usable_cores
from dash_export.backends.maker import Backend, plan_segments
from dash_export.bundle.bundle import Bundle
from dash_export.bundle.records import EngineRecord, Manifest, Segment
from dash_export.errors import BackendError

if TYPE_CHECKING:
    import onnx_ir as ir

    from dash_export.graphs.lower.rounded import Roundings

_FOLDING_BYTES = 40
"""Bytes that ONNX Runtime takes per weight of a GGUF file's blocks, while it folds their dequantisation to float32."""


class CpuBackend(Backend):
    """Lowered graphs. ONNX Runtime packs weights for this machine's kernels at loading."""

    on_device = False
    revision = 22

    def faults(self) -> Iterator[str]:
        recipe, weights = self.recipe, self.recipe.weights
        if recipe.engine is not None:
            yield "an [engine] table is for GPU backends; onnxruntime has none."
        if recipe.dialect == "trt10":
            yield "dialect 'trt10' is for GPU backends; onnxruntime takes 'ort' or 'portable'."
        for part, value in recipe.precisions.items():
            if value in ("fp16", "bf16", "fp8"):
                yield f"{part} = {value!r}: on a CPU weights are 'fp32', 'int8' or 'int4'."
            if recipe.dialect == "portable" and value != "fp32":
                yield f"{part} = {value!r}: dialect 'portable' runs the graphs as they are, in 'fp32'."
        if weights.rounding == "as-is" and (weights.block_size != 32 or weights.symmetric):
            yield "rounding = 'as-is' takes blocks of 32 and zero points (symmetric = false): see --target cpu-gguf."
        if recipe.runtime.dispatch != "sync":
            yield f"dispatch {recipe.runtime.dispatch!r} needs a GPU backend."

    def check_model(self, manifest: Manifest) -> None:
        if self.recipe.dialect != "portable":  # which runs the graphs of any model
            super().check_model(manifest)

    def build_obstacle(self) -> str | None:
        return self.run_obstacle()

    def version(self) -> str:
        return version("onnxruntime")

    def device(self) -> str:
        return f"{cpu_name()}, {usable_cores()} cores"

    def start(self) -> None:
        """Start the process's only thread pool, with as many threads as costs are measured with."""
        load_backend(self.recipe.backend, self.recipe.runtime.threads)

    def ready_engines(self, bundle: Bundle) -> dict[str, EngineRecord] | None:
        """Return the portable graphs where they are the engines. Raises BackendError where their head is too large."""
        if self.recipe.dialect != "portable":
            return None
        sizes = {record.name: record.bytes for record in bundle.manifest.files}
        model, head = bundle.manifest.model, bundle.manifest.graphs["head"]
        weights = getattr(model, "vocab_size", 0) * model.hidden_size
        stored = sizes.get("onnx/head.data", sizes.get("onnx/embed.data", sizes[head]))
        needed, is_blocks = _FOLDING_BYTES * weights, stored < 1.5 * weights  # blocks of a GGUF file
        if is_blocks and needed > available_memory():
            raise BackendError(
                f"ONNX Runtime takes {needed / 1e9:.0f} GB to read the portable head of {model.name}, and so much is "
                "not free: it makes float32 of blocks in several steps. Use --target cpu --weights fp32."
            )
        return {
            name: EngineRecord(file, sizes[file] + sizes.get(f"onnx/{name}.data", 0), bundle.manifest.key)
            for name, file in bundle.manifest.graphs.items()
        }

    def segments(self, manifest: Manifest) -> tuple[Segment, ...]:
        """Return the segments, the embedding apart: so states may come from elsewhere, for one launch more. A policy
        that decides about whole inputs is an engine of its own, as it reads all tokens.
        """
        policy = manifest.policy
        apart = {policy.read} if policy.has_network and manifest.model.decides == "input" else set()
        return plan_segments(manifest.model.num_layers, policy.units, cut={0, *apart})

    def key(self) -> Any:
        return self.version()

    def lower(
        self, bundle: Bundle, name: str, parts: Sequence[str], _composed: Callable[[], ir.Model], roundings: Roundings
    ) -> ir.Model:
        from dash_export.graphs.lower.ort import engine_graph
        from dash_export.graphs.lower.surgery import load_graph

        graphs = {part: load_graph(bundle.graph(part)) for part in parts}
        doc = f"{', '.join(parts)} of {bundle.manifest.model.name}"
        return engine_graph(name, doc, graphs, bundle.manifest, self.recipe, roundings)
