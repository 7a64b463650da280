"""ONNX Runtime's CUDA provider without a card: a session computes on the CPU, on the stand-in's memory and on the
stream that it is given. It cannot be recorded, and waits for its own end unless a run says otherwise.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import onnxruntime as ort

from tests.standin.cuda import Card
from tests.standin.memory import rule
from tests.standin.trt import SCRATCH, TYPES, Context, Engine

PROVIDERS = ["CUDAExecutionProvider", "CPUExecutionProvider"]
NAMES = {1: "float", 7: "int64", 10: "float16", 16: "bfloat16"}
"""What a session calls an element type, by its number in ONNX."""


class Session:
    def __init__(self, card: Card, path: str, _options: ort.SessionOptions, providers: Sequence[Any]) -> None:
        (name, cuda), other = providers
        assert [name, other] == PROVIDERS
        assert (cuda["device_id"], cuda["use_tf32"]) == (0, "0")
        self.stream = int(cuda["user_compute_stream"])
        model = onnx.load(path)
        self.engine = Engine(card, False, pickle.dumps((Path(path).stem, model.SerializeToString(), [{}], False)))
        _, self.arena = card.cudaMalloc(SCRATCH)
        self.get_providers = lambda: PROVIDERS
        self.get_inputs = lambda: [self._tensor(name) for name in self.engine.inputs]
        self.get_outputs = lambda: [self._tensor(name) for name in self.engine.outputs]

    def _tensor(self, name: str) -> Any:
        shape = self.engine.tensors[name].shape
        return SimpleNamespace(name=name, shape=shape, type=f"tensor({NAMES[self.number(name)]})")

    def number(self, name: str) -> int:
        """The number of an element type in ONNX."""
        return next(number for number in NAMES if TYPES[number] == self.engine.types[name])

    def io_binding(self) -> Binding:
        return Binding(self)

    def run_with_iobinding(self, binding: Binding, options: ort.RunOptions) -> None:
        tensors = binding._tensors()
        wrong = [name for name, shape in binding.given.items() if tensors[name]().shape != shape]
        rule(not wrong, f"{wrong} of {self.engine.name} are bound with other shapes")
        binding.execute_async_v3(self.stream)  # what a launch is on this card
        if options.get_run_config_entry("disable_synchronize_execution_providers") != "1":
            self.engine.card.cudaStreamSynchronize(self.stream)


class Binding(Context):
    def __init__(self, session: Session) -> None:
        super().__init__(session.engine, captures=False)
        self.session, self.scratch = session, session.arena
        self.given: dict[str, tuple[int, ...]] = {}
        self.bind_input = self.bind_output = self._bind

    def _bind(self, name: str, kind: str, device: int, number: int, shape: list[int], address: int) -> None:
        assert (kind, device, number) == ("cuda", 0, self.session.number(name))
        self.set_tensor_address(name, address)
        self.given[name] = tuple(shape)
        if name in self.engine.inputs:
            self.shapes[name] = tuple(shape)


def onnxruntime(card: Card) -> Any:
    """In the place of `onnxruntime` where it is asked for CUDA."""
    module = SimpleNamespace(get_available_providers=lambda: PROVIDERS, preload_dlls=lambda: None)
    module.__version__, module.InferenceSession = ort.__version__, partial(Session, card)
    module.SessionOptions, module.RunOptions = ort.SessionOptions, ort.RunOptions
    return module
