"""The same checkpoint in other runtimes: prefill and decode, interleaved, and the perplexity of each one's own weights.

    python tools/bench/peers.py BUNDLE MODEL.gguf

Every peer runs in a virtual environment that this script makes under .cache/peers/ (several GB with all of them), never
in the project's own. What cannot be installed or started is left out with a message.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
import numpy.typing as npt
from common import print_json
from rich.console import Console
from rich.table import Table
from safetensors.numpy import save_file

from dash_export.bundle import Bundle
from dash_export.models import open_checkpoint
from dash_export.models.spec import row_blocks
from dash_export.runtime.text import Text

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".cache" / "peers"
HELD_OUT = ROOT / "calibration" / "heldout.txt"  # no policy was trained on it
WINDOW = 256
console = Console(highlight=False)
if not console.is_terminal:
    console.width = 120


@dataclass(frozen=True)
class Peer:
    """One row: `environment` with `packages` runs `peer.py kind model`."""

    name: str
    kind: str
    environment: str
    packages: tuple[str, ...]
    model: Callable[[Path, Path], str]


def folder(bundle: Path, gguf: Path) -> str:
    """The checkpoint as a Hugging Face folder of fp32 weights, for the peers that read no GGUF."""
    out = CACHE / f"{gguf.stem}-fp32"
    if not (out / "model.safetensors").exists():
        weights = open_checkpoint(gguf).weights
        out.mkdir(exist_ok=True)
        for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
            if (bundle / name).exists():
                shutil.copy(bundle / name, out / name)
        arrays = {name: np.concatenate(list(row_blocks(weight))) for name, weight in weights.items()}
        save_file(arrays, out / "model.safetensors", {"format": "pt"})
    return str(out)


def genai_model(bundle: Path, gguf: Path, precision: str) -> str:
    """What onnxruntime-genai's own builder makes of it, with its defaults."""
    out = CACHE / f"{gguf.stem}-genai-{precision}"
    if not (out / "genai_config.json").exists():
        builder = [_python("onnxruntime-genai"), "-m", "onnxruntime_genai.models.builder"]
        _checked(
            [*builder, "-i", folder(bundle, gguf), "-o", out, "-p", precision, "-e", "cpu", "-c", CACHE / "builder"]
        )
    return str(out)


def the_gguf(_bundle: Path, gguf: Path) -> str:
    return str(gguf)


GENAI = ("onnxruntime-genai", ("onnxruntime-genai", "onnx_ir", "onnx", "transformers", "torch", "huggingface_hub"))
PEERS = (
    Peer("onnxruntime-genai int4", GENAI[0], *GENAI, lambda bundle, gguf: genai_model(bundle, gguf, "int4")),
    Peer("onnxruntime-genai fp32", GENAI[0], *GENAI, lambda bundle, gguf: genai_model(bundle, gguf, "fp32")),
    Peer("OpenVINO GenAI, the GGUF", "openvino-genai", "openvino-genai", ("openvino-genai", "numpy"), the_gguf),
    Peer("llama.cpp, the GGUF", "llama.cpp", "llama.cpp", ("llama-cpp-python", "numpy"), the_gguf),
    Peer(
        "transformers fp32",
        "transformers",
        "transformers",
        ("transformers", "torch", "numpy", "safetensors"),
        folder,
    ),
)


class Worker:
    """A running `peer.py`."""

    def __init__(self, python: str, kind: str, model: str, threads: int) -> None:
        script = Path(__file__).with_name("peer.py")
        environment = {**os.environ, "ORT_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [python, script, kind, model, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise click.ClickException(f"it ended with code {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return self._answer()


@click.command()
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.argument("gguf", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--ours", multiple=True, default=("cpu::dense",), show_default=True, help="TARGET::dense or ::skipped=N.")
@click.option("--peers", "only", help="Only peers with this in their name.")
@click.option("--prompt", default=512, show_default=True, help="Tokens of the prompt.")
@click.option("--tokens", default=128, show_default=True, help="New tokens.")
@click.option("--rounds", default=7, show_default=True, help="Interleaved rounds; the first is warm-up.")
@click.option("--threads", default=2, show_default=True)
@click.option("--windows", default=12, show_default=True, help=f"Windows of {WINDOW} tokens for the perplexity.")
def main(
    bundle: Path,
    gguf: Path,
    ours: tuple[str, ...],
    only: str | None,
    prompt: int,
    tokens: int,
    rounds: int,
    threads: int,
    windows: int,
) -> None:
    """Time the same prompt in every runtime, one after another, round by round."""
    CACHE.mkdir(parents=True, exist_ok=True)
    text = HELD_OUT.read_text(encoding="utf-8")
    ids = np.array(Text(Bundle.open(bundle).root).encode(text), np.int64)
    workers = {
        f"dash-export {item}": Worker(sys.executable, "dash-export", f"{bundle}::{item}", threads) for item in ours
    }
    for peer in PEERS:
        if only is None or only.casefold() in peer.name.casefold():
            try:
                _environment(peer)
                workers[peer.name] = Worker(_python(peer.environment), peer.kind, peer.model(bundle, gguf), threads)
            except click.ClickException as error:
                console.print(f"{peer.name} is left out: {error.message}")
    surprises = {name: _perplexity(worker, ids, windows) for name, worker in workers.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in workers}
    for round_ in range(rounds):
        for name, worker in workers.items():
            # Another prompt every round: some keep what they have seen.
            answer = worker.ask(prompt=ids[round_ : round_ + prompt].tolist(), tokens=tokens)
            if round_:
                times[name].append((prompt / answer["prefill"], (tokens - 1) / answer["decode"]))
    _report(times, surprises, prompt, tokens)


def _report(
    times: dict[str, list[tuple[float, float]]], surprises: dict[str, float | None], prompt: int, tokens: int
) -> None:
    base = next(iter(times))
    console.print(f"Ratios: what {base} does against the row's runtime, round by round.")
    table = Table(
        "runtime",
        "decode tok/s",
        "ratio",
        "prefill tok/s",
        "ratio",
        "perplexity",
        title=f"{prompt} prompt tokens, {tokens} new ones, medians of {len(times[base])} interleaved rounds",
    )
    result = {}
    for name, pairs in times.items():
        prefill, decode = (median(values) for values in zip(*pairs, strict=True))
        ratios = [
            median(mine[part] / theirs[part] for mine, theirs in zip(times[base], pairs, strict=True))
            for part in (0, 1)
        ]
        seen = surprises[name]
        perplexity = "not shown" if seen is None else f"{seen:.2f}"
        table.add_row(name, f"{decode:.1f}", f"{ratios[1]:.2f}x", f"{prefill:.0f}", f"{ratios[0]:.2f}x", perplexity)
        result[name] = {"decode": round(decode, 2), "prefill": round(prefill, 1), "perplexity": seen}
    console.print(table)
    print_json("peers", {"prompt": prompt, "tokens": tokens, "runtimes": result})


def _perplexity(worker: Worker, ids: npt.NDArray[np.int64], windows: int) -> float | None:
    surprises: list[float] = []
    for start in np.linspace(0, len(ids) - WINDOW, windows).astype(int):
        found = worker.ask(score=ids[start : start + WINDOW].tolist())["nll"]
        if found is None:
            return None
        surprises += found
    return float(np.exp(np.mean(surprises)))


def _python(environment: str) -> str:
    return str(CACHE / environment / "bin" / "python")


def _environment(peer: Peer) -> None:
    place, done = CACHE / peer.environment, CACHE / peer.environment / "installed"
    if not done.exists():
        console.print(f"installing {', '.join(peer.packages)} into {place}")
        venv.create(place, with_pip=True, clear=True)
        _checked([_python(peer.environment), "-m", "pip", "install", "-q", *peer.packages])
        done.touch()


def _checked(command: Iterable[object]) -> None:
    finished = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if finished.returncode:
        lines = (finished.stderr or finished.stdout).strip().splitlines()
        raise click.ClickException(lines[-1] if lines else f"code {finished.returncode}")


if __name__ == "__main__":
    main()
