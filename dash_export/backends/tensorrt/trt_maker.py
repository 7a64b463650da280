"""Makers of TensorRT engines. TensorRT compiles only for the device it runs on, TensorRT-RTX ahead of time on any
machine. A lowered ONNX file that is made here is not kept: `build --verify` makes it again. Engine files hold their
weights themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dash_export.backends.cuda.cuda_devices import cuda_devices
from dash_export.backends.cuda.cuda_maker import GpuBackend, LoweringBackend
from dash_export.backends.cuda.device_encoder import BATCH
from dash_export.backends.maker import Backend
from dash_export.backends.tensorrt.trt_api import PORTABLE_SINCE, Profile, load_toolkit
from dash_export.bundle.layout import TIMING_CACHE
from dash_export.bundle.records import Manifest
from dash_export.core.facts import EncoderFacts, TextFacts
from dash_export.errors import BackendError

if TYPE_CHECKING:
    import onnx_ir as ir

JETSONS = ("8.7", "11.0")
"""Compute capabilities of Orin and Thor, whose TensorRT comes with JetPack and not from PyPI."""
FP8_SINCE = 8.9
"""Lowest compute capability with fp8 (Ada; Hopper and later have it, too)."""
INT4_BLOCKS = (64, 128)
"""Inputs that share a scale, as NVIDIA documents them ("Quantization Schemes" of TensorRT's documentation)."""
USUAL_TOKENS, USUAL_BATCH = 128, 8
"""Tokens of a text, and inputs at a time, that an encoder's kernels are chosen for."""
RTX_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
"""Compute capabilities that TensorRT-RTX 1.7 compiles for; TensorRT itself compiles for the device it runs on."""


class RtxBackend(GpuBackend):
    """TensorRT-RTX, which compiles ahead of time for all compute capabilities of the recipe."""

    compiles = True
    encodes = True
    _encoder: EncoderFacts | None = None
    """The model, where it is an encoder."""

    def faults(self) -> Iterator[str]:
        recipe, engine, precisions = self.recipe, self.recipe.engine, self.recipe.precisions.values()
        if engine is not None and engine.activations == "fp32":
            yield "activations = 'fp32': TensorRT has no fp32 attention; take 'fp16' or 'bf16'."
        yield from super().faults()
        if engine is None:
            return
        foreign = sorted(set(engine.capabilities) - set(RTX_CAPABILITIES))
        if recipe.backend == "tensorrt_rtx" and foreign:
            yield f"TensorRT-RTX does not compile for {foreign[0]}; it knows {', '.join(RTX_CAPABILITIES)}."
        if "int4" in precisions and recipe.weights.block_size not in INT4_BLOCKS:
            yield f"block_size = {recipe.weights.block_size}: TensorRT's int4 has blocks of 64 or 128."
        if "fp8" in precisions:
            if old := [item for item in engine.capabilities if float(item) < FP8_SINCE]:
                taken = f"take {', '.join(old)} out of `capabilities`"
                yield f"'fp8' needs compute capability {FP8_SINCE} or newer: {taken}."
            if recipe.weights.rounding != "gptq":
                yield "'fp8' needs rounding = 'gptq': the range of what a matrix is fed is measured."

    def check_model(self, manifest: Manifest) -> None:
        self._encoder = manifest.encoder if manifest.model.decides == "input" else None

    def build_obstacle(self) -> str | None:
        package = self.recipe.backend
        return None if find_spec(package) else f"the package {package} is not installed ({self.how_to_install()})."

    def version(self) -> str:
        return load_toolkit(self.recipe.backend).version

    def device(self) -> str:
        return f"any device of compute capability {', '.join(self.engine.capabilities)}"

    def details(self) -> dict[str, Any]:
        """Return the compiler, and all settings that it was given beside the graphs."""
        engine = self.engine
        return {
            "compiler": load_toolkit(self.recipe.backend).describe(),
            "profiles": [*self._profiles()],
            "capabilities": list(engine.capabilities),
            "optimization_level": engine.optimization_level,
            "aux_streams": engine.aux_streams,
            "workspace_bytes": engine.workspace_mib << 20,
            "strongly_typed": True,
        }

    def key(self) -> Any:
        """Return what all engines depend on. Raises BackendError where this TensorRT cannot compile the dialect."""
        if (reason := self.refused_version(self.version())) is not None:
            raise BackendError(reason)
        recipe = self.recipe
        told = recipe.dialect, asdict(self.engine), recipe.runtime.prefill_chunk
        return recipe.backend, self.version(), self.device(), *told

    def save(self, model: ir.Model, folder: Path, out: Path, extended: Sequence[Path]) -> list[Path]:
        """Compile the lowered graph. TensorRT's timing cache (kernel times of the device) is kept in `folder`."""
        return self.compile(super().save(model, folder, out, extended)[0], folder, out)

    def compile(self, graph: Path, folder: Path, out: Path) -> list[Path]:
        toolkit, timing = load_toolkit(self.recipe.backend), folder / TIMING_CACHE
        path = out.with_name(f"{out.name}.engine")
        known = b"" if toolkit.is_rtx or not timing.is_file() else timing.read_bytes()
        engine, learnt = toolkit.compile(graph, self.engine, [*self._profiles().values()], known)
        with path.open("wb") as file:
            file.write(memoryview(engine))
        if learnt and learnt != known:
            out.with_name(timing.name).write_bytes(learnt)
            out.with_name(timing.name).replace(timing)
        return [path]

    def _profiles(self) -> dict[str, Profile]:
        """Return (smallest, best, largest) sizes, (sequences, tokens of each), of each profile that `_bind` uses."""
        if (encoder := self._encoder) is not None:
            most = encoder.max_positions if isinstance(encoder, TextFacts) else encoder.tokens
            best = min(most, USUAL_TOKENS)
            if self.engine.profiles == 1:
                return {"both": ((1, 1), (1, best), (BATCH, most))}
            return {"one": ((1, 1), (1, best), (1, most)), "several": ((2, 1), (USUAL_BATCH, best), (BATCH, most))}
        chunk, most = self.recipe.runtime.prefill_chunk, self.engine.sequences
        if self.engine.profiles == 1:
            return {"both": ((1, 1), (1, 1), (most, chunk))}
        found = {"decode": ((1, 1), (1, 1), (1, 1)), "prefill": ((1, 1), (1, chunk), (1, chunk))}
        return found | ({"together": ((2, 1), (most, 1), (most, 1))} if most > 1 else {})


class TensorRTBackend(RtxBackend):
    """TensorRT, which compiles only for the device of this machine."""

    def here(self) -> Backend:
        return LoweringBackend(self.recipe) if self.needs_another_machine() else super().here()

    def build_obstacle(self) -> str | None:
        return self.device_obstacle() or super().build_obstacle()

    def needs_another_machine(self) -> bool:
        return self.device_obstacle() is not None

    def how_to_install(self) -> str:
        if set(JETSONS) & set(self.engine.capabilities):
            return "sudo apt install python3-libnvinfer, and in a virtual environment --system-site-packages"
        return super().how_to_install()

    def refused_version(self, version: str) -> str | None:
        young = tuple(int(part) for part in version.split(".")[:2]) >= PORTABLE_SINCE
        if self.recipe.dialect != "portable" or young:
            return None
        return (
            f"TensorRT {version} has no KV cache update: the portable dialect needs "
            f"{'.'.join(map(str, PORTABLE_SINCE))} or newer. Copy engines/{self.recipe.name}.toml and set dialect = "
            "'trt10'."
        )

    def device(self) -> str:
        try:
            here = cuda_devices()[0]
        except BackendError:
            return "unknown"
        return f"{here.name} (compute capability {here.capability})"
