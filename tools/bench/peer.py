"""One runtime under `peers.py`, in a process and a virtual environment of its own: it answers JSON lines.

    python peer.py NAME MODEL THREADS

{"prompt": [ids], "tokens": n} -> {"prefill": seconds, "decode": seconds}: the prompt up to its first new token, then
n - 1 more, greedily. {"score": [ids]} -> {"nll": [...]}, the surprise of every token after the first, in nats; null
where the runtime shows no logits. Everything else it prints goes to stderr.
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


class DashExport:
    """MODEL is BUNDLE, TARGET and setting: `my.dash::cpu::dense`, `my.dash::cpu::skipped=4`."""

    def __init__(self, model: str, threads: int) -> None:
        from dash_export import DashRuntime
        from dash_export.runtime.backends.onnxruntime import start_thread_pool

        bundle, target, setting = model.split("::")
        start_thread_pool(threads)
        self.runtime = DashRuntime.load(bundle, target)
        key, _, value = setting.partition("=")
        options: dict[str, Any] = {"policy": key} if not value else {"policy": "token", key: float(value)}
        self.session = self.runtime.session(**options)

    def run(self, prompt: list[int], tokens: int) -> tuple[float, float]:
        session = self.session
        session.reset()
        began = time.perf_counter()
        token = int(np.argmax(session.prefill(np.array(prompt, np.int64))))
        first = time.perf_counter()
        for _ in range(tokens - 1):
            token = int(np.argmax(session.decode_one(token)[0]))
        return first - began, time.perf_counter() - first

    def nll(self, ids: list[int]) -> list[float]:
        return [float(-x) for x in self.session.score(ids).log_likelihoods]


class OnnxRuntimeGenai:
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

    def nll(self, ids: list[int]) -> list[float] | None:
        generator = self._generator(len(ids) + 1)
        found = []
        # One token at a time: what the prompt's other positions gave is not shown.
        for token, following in pairwise(ids):
            generator.append_tokens(np.array([token], np.int32))
            found.append(_surprise(np.asarray(generator.get_logits()).reshape(-1), following))
        return found


class OpenVinoGenai:
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


class LlamaCpp:
    def __init__(self, model: str, threads: int) -> None:
        from llama_cpp import Llama

        self.llama = Llama(
            model, n_ctx=1024, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False, logits_all=False
        )

    def _last(self) -> Any:
        size = self.llama.n_vocab()
        return np.ctypeslib.as_array(self.llama._ctx.get_logits(), shape=(size,))

    def run(self, prompt: list[int], tokens: int) -> tuple[float, float]:
        self.llama.reset()
        began = time.perf_counter()
        self.llama.eval(prompt)
        token = int(np.argmax(self._last()))
        first = time.perf_counter()
        for _ in range(tokens - 1):
            self.llama.eval([token])
            token = int(np.argmax(self._last()))
        return first - began, time.perf_counter() - first

    def nll(self, ids: list[int]) -> list[float]:
        self.llama.reset()
        found = []
        for token, following in pairwise(ids):
            self.llama.eval([token])
            found.append(_surprise(self._last(), following))
        return found


class Transformers:
    def __init__(self, model: str, threads: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self.torch = torch
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()

    def run(self, prompt: list[int], tokens: int) -> tuple[float, float]:
        with self.torch.inference_mode():
            began = time.perf_counter()
            out = self.model(self.torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
            token = out.logits[0, -1].argmax()
            first = time.perf_counter()
            for _ in range(tokens - 1):
                out = self.model(token[None, None], past_key_values=out.past_key_values, use_cache=True)
                token = out.logits[0, -1].argmax()
            return first - began, time.perf_counter() - first

    def nll(self, ids: list[int]) -> list[float]:
        with self.torch.inference_mode():
            logits = self.model(self.torch.tensor([ids])).logits[0].numpy()
        return [_surprise(row, following) for row, following in zip(logits, ids[1:], strict=False)]


PEERS: dict[str, Any] = {
    "dash-export": DashExport,
    "onnxruntime-genai": OnnxRuntimeGenai,
    "openvino-genai": OpenVinoGenai,
    "llama.cpp": LlamaCpp,
    "transformers": Transformers,
}


def _surprise(logits: Any, token: int) -> float:
    row = logits.astype(np.float64)
    top = row.max()
    return float(top + np.log(np.exp(row - top).sum()) - row[token])


def main() -> None:
    """Answer until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is not an answer
    peer = PEERS[sys.argv[1]](sys.argv[2], int(sys.argv[3]))
    print("{}", file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "score" in request:
            answer: dict[str, Any] = {"nll": peer.nll(request["score"])}
        else:
            prefill, decode = peer.run(request["prompt"], request["tokens"])
            answer = {"prefill": prefill, "decode": decode}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
