"""One runtime under `peers.py`, in a process and a virtual environment of its own: it answers JSON lines.

    python peer.py NAME MODEL THREADS

{"prompt": [ids], "tokens": n} -> {"prefill": seconds, "decode": seconds}: the prompt up to its first new token, then
n - 1 more, greedily. {"score": [ids]} -> {"nll": [...]}, nats of every token after the first; null where the runtime
shows no logits. Everything else it prints goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np


class Peer:
    """A runtime that shows the logits of the last token."""

    def begin(self) -> None:
        raise NotImplementedError

    def after(self, tokens: list[int]) -> Any:
        raise NotImplementedError

    def run(self, prompt: list[int], tokens: int) -> tuple[float, float]:
        began = time.perf_counter()
        self.begin()
        token = int(np.argmax(self.after(prompt)))
        first = time.perf_counter()
        for _ in range(tokens - 1):
            token = int(np.argmax(self.after([token])))
        return first - began, time.perf_counter() - first

    def nll(self, ids: list[int]) -> list[float] | None:
        """One token at a time: some runtimes show nothing of a prompt's other positions."""
        self.begin()
        return [_nll(self.after([token]), following) for token, following in pairwise(ids)]


class DashExport(Peer):
    """MODEL is BUNDLE, TARGET and setting: `my.dash::cpu::dense`, `my.dash::cpu::skipped=4`."""

    def __init__(self, model: str, threads: int) -> None:
        from dash_export import DashRuntime

        bundle, target, setting = model.split("::")
        key, _, value = setting.partition("=")
        options: dict[str, Any] = {"policy": key} if not value else {"policy": "token", key: float(value)}
        self.session = DashRuntime.load(bundle, target, threads=threads).session(**options)

    def begin(self) -> None:
        self.session.reset()

    def after(self, tokens: list[int]) -> Any:
        if len(tokens) > 1:
            return self.session.prefill(np.array(tokens, np.int64))
        return self.session.decode_one(tokens[0])[0]

    def nll(self, ids: list[int]) -> list[float]:
        return [float(-x) for x in self.session.score(ids).log_likelihoods]


class OnnxRuntimeGenai(Peer):
    def __init__(self, model: str, threads: int) -> None:
        import onnxruntime_genai as og

        config = Path(model, "genai_config.json")
        facts = json.loads(config.read_text())
        facts["model"]["decoder"]["session_options"]["intra_op_num_threads"] = threads
        config.write_text(json.dumps(facts))
        self.og, self.model = og, og.Model(model)

    def _generator(self, length: int) -> Any:
        params = self.og.GeneratorParams(self.model)
        params.set_search_options(max_length=length, min_length=length, do_sample=False)
        return self.og.Generator(self.model, params)

    def run(self, prompt: list[int], tokens: int) -> tuple[float, float]:
        generator = self._generator(len(prompt) + tokens)
        began = time.perf_counter()
        generator.append_tokens(np.array(prompt, np.int32))
        generator.generate_next_token()
        first = time.perf_counter()
        for _ in range(tokens - 1):
            generator.generate_next_token()
        return first - began, time.perf_counter() - first

    def begin(self) -> None:
        self.generator = self._generator(1024)

    def after(self, tokens: list[int]) -> Any:
        self.generator.append_tokens(np.array(tokens, np.int32))
        return np.asarray(self.generator.get_logits()).reshape(-1)


class OpenVinoGenai(Peer):
    def __init__(self, model: str, threads: int) -> None:
        import openvino as ov
        import openvino_genai as genai

        self.ov, self.genai = ov, genai
        self.pipeline = genai.LLMPipeline(model, "CPU", INFERENCE_NUM_THREADS=threads)

    def run(self, prompt: list[int], tokens: int) -> tuple[float, float]:
        ids = np.array([prompt], np.int64)
        inputs = self.genai.TokenizedInputs(self.ov.Tensor(ids), self.ov.Tensor(np.ones_like(ids)))
        config = self.genai.GenerationConfig(max_new_tokens=tokens, ignore_eos=True, do_sample=False)
        metrics = self.pipeline.generate(inputs, config).perf_metrics
        prefill, total = metrics.get_ttft().mean / 1e3, metrics.get_generate_duration().mean / 1e3
        return prefill, total - prefill

    def nll(self, _ids: list[int]) -> None:
        return None


class LlamaCpp(Peer):
    def __init__(self, model: str, threads: int) -> None:
        from llama_cpp import Llama

        self.llama = Llama(
            model, n_ctx=1024, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False, logits_all=False
        )

    def begin(self) -> None:
        self.llama.reset()

    def after(self, tokens: list[int]) -> Any:
        self.llama.eval(tokens)
        return np.ctypeslib.as_array(self.llama._ctx.get_logits(), shape=(self.llama.n_vocab(),))


PEERS: dict[str, Any] = {
    "dash-export": DashExport,
    "onnxruntime-genai": OnnxRuntimeGenai,
    "openvino-genai": OpenVinoGenai,
    "llama.cpp": LlamaCpp,
}


def _nll(logits: Any, token: int) -> float:
    row = logits.astype(np.float64)
    return float(np.log(np.exp(row - row.max()).sum()) + row.max() - row[token])


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is not an answer
    peer: Peer = PEERS[sys.argv[1]](sys.argv[2], int(sys.argv[3]))
    print("{}", file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "score" in request:
            answer: dict[str, Any] = {"nll": peer.nll(request["score"])}
        else:
            answer = dict(zip(("prefill", "decode"), peer.run(request["prompt"], request["tokens"]), strict=True))
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
