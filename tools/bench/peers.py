"""The same checkpoint in other runtimes: prefill and decode, interleaved, and the perplexity of each one's own weights.

    python tools/bench/peers.py BUNDLE MODEL.gguf

Every peer runs in a virtual environment under .cache/peers/. What cannot be installed or started is left out.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
from common import HELD_OUT, print_json, ratios
from safetensors.numpy import save_file

from dash_export.commands.tables import print_table
from dash_export.measure.intervals import interval
from dash_export.measure.timing import in_turns
from dash_export.models import open_checkpoint
from dash_export.models.spec import row_blocks
from dash_export.text.tokenizer import Text

CACHE = Path(__file__).parents[2] / ".cache" / "peers"
WINDOW = 256
Nats = npt.NDArray[np.float64] | None
# Kind -> what its environment needs.
PACKAGES = {
    "onnxruntime-genai": ("onnxruntime-genai", "onnx_ir", "onnx", "transformers", "torch", "huggingface_hub"),
    "openvino-genai": ("openvino-genai", "numpy"),
    "llama.cpp": ("llama-cpp-python", "numpy"),
}
# Name -> kind, and the form of the model that it reads.
PEERS = {
    "onnxruntime-genai int4": ("onnxruntime-genai", "int4"),
    "OpenVINO GenAI, the GGUF": ("openvino-genai", "gguf"),
    "llama.cpp, the GGUF": ("llama.cpp", "gguf"),
}


def model_for(form: str, bundle: Path, gguf: Path) -> Path:
    """The checkpoint in this form: the file, a folder of fp32 weights, or what genai's own builder makes of it."""
    if form == "gguf":
        return gguf
    if form == "folder":
        out = CACHE / f"{gguf.stem}-fp32"
        if not (out / "model.safetensors").exists():
            out.mkdir(exist_ok=True)
            for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
                if (bundle / name).exists():
                    shutil.copy(bundle / name, out / name)
            weights = open_checkpoint(gguf).weights
            arrays = {name: np.concatenate(list(row_blocks(weight))) for name, weight in weights.items()}
            save_file(arrays, out / "model.safetensors", {"format": "pt"})
        return out
    out = CACHE / f"{gguf.stem}-genai-{form}"
    if not (out / "genai_config.json").exists():
        builder = [_python("onnxruntime-genai"), "-m", "onnxruntime_genai.models.builder"]
        checkpoint = model_for("folder", bundle, gguf)
        _checked([*builder, "-i", checkpoint, "-o", out, "-p", form, "-e", "cpu", "-c", CACHE / "builder"])
    return out


class Worker:
    def __init__(self, python: str, kind: str, model: object, threads: int) -> None:
        script = Path(__file__).with_name("peer.py")
        environment = {**os.environ, "ORT_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1"}
        command = [python, script, kind, str(model), str(threads)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(command, text=True, env=environment, **pipes)  # type: ignore[call-overload]
        self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            raise click.ClickException(f"it ended with code {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, **request: Any) -> dict[str, Any]:
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return self._answer()

    def nll(self, ids: npt.NDArray[np.int64], windows: int) -> Nats:
        """The mean of each of some windows spread over a text; None where logits are not shown."""
        starts = np.linspace(0, len(ids) - WINDOW, windows).astype(int)
        found = [self.ask(score=ids[start : start + WINDOW].tolist())["nll"] for start in starts]
        return None if found[0] is None else np.mean(found, axis=1)


@click.command()
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.argument("gguf", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--ours", multiple=True, default=("cpu::dense",), show_default=True, help="TARGET::dense or ::skipped=N.")
@click.option("--peers", "only", multiple=True, help="Only peers with this in their name; repeatable.")
@click.option("--prompt", default=512, show_default=True, help="Tokens of the prompt.")
@click.option("--tokens", default=128, show_default=True, help="New tokens.")
@click.option(
    "--rounds", type=click.IntRange(2), default=7, show_default=True, help="Interleaved rounds; the first is warm-up."
)
@click.option("--threads", default=2, show_default=True)
@click.option("--windows", default=12, show_default=True, help=f"Windows of {WINDOW} tokens for the perplexity.")
@click.option("--text", default=HELD_OUT, show_default="calibration/heldout.txt",
              type=click.Path(exists=True, dir_okay=False, path_type=Path))  # fmt: skip
def main(
    bundle: Path, gguf: Path, ours: tuple[str, ...], only: tuple[str, ...], prompt: int, tokens: int, rounds: int,
    threads: int, windows: int, text: Path,
) -> None:  # fmt: skip
    """Time the same prompt in every runtime, in turns, round by round."""
    CACHE.mkdir(parents=True, exist_ok=True)
    ids = np.array(Text(bundle).encode(text.read_text(encoding="utf-8")), np.int64)
    workers = {f"dash-export {own}": Worker(sys.executable, "dash-export", f"{bundle}::{own}", threads) for own in ours}
    for name, (kind, form) in PEERS.items():
        if not only or any(part.casefold() in name.casefold() for part in only):
            try:
                _install(kind)
                workers[name] = Worker(_python(kind), kind, model_for(form, bundle, gguf), threads)
            except click.ClickException as error:
                click.echo(f"{name} is left out: {error.message}")
    names = list(workers)
    nats = {name: worker.nll(ids, windows) for name, worker in workers.items()}
    seconds: dict[str, dict[str, list[float]]] = {part: {name: [] for name in names} for part in ("prefill", "decode")}
    for number, index in in_turns(len(names), rounds):
        # Another prompt every round: some keep what they have seen.
        answer = workers[names[index]].ask(prompt=ids[number : number + prompt].tolist(), tokens=tokens)
        for part, own in seconds.items():
            if number:
                own[names[index]].append(answer[part])
    _report(seconds, nats, {"prefill": prompt, "decode": tokens - 1}, rounds - 1)


def _report(
    seconds: dict[str, dict[str, list[float]]], nats: dict[str, Nats], counts: dict[str, int], rounds: int
) -> None:
    first, own = next(iter(nats.items()))
    click.echo(f"Ratios, and perplexity over the row's: what {first} does against the row's runtime.")
    title = f"{counts['prefill']} prompt tokens, {counts['decode'] + 1} new ones, medians of {rounds} rounds in turns"
    shown = []
    times = {part: ratios(own) for part, own in seconds.items()}
    result = {}
    for name, found in nats.items():
        cells, row = [name], dict[str, Any]()
        for part in ("decode", "prefill"):
            row[part] = round(counts[part] / float(np.median(seconds[part][name])), 2)
            cells += [f"{row[part]:.1f}", f"{times[part][name].value:.2f}x"]
        if found is None or own is None:
            shown.append((*cells, "not shown", ""))
        else:
            over = interval(own - found, transform=np.exp)
            row |= {"perplexity": float(np.exp(found.mean())), "over": [over.value, over.low, over.high]}
            percent = (f"{100 * (each - 1):+.2f}" for each in (over.value, over.low, over.high))
            shown.append((*cells, f"{row['perplexity']:.2f}", "{} % ({} to {})".format(*percent)))
        result[name] = row
    print_table(
        title, ("runtime",), ("decode tok/s", "ratio", "prefill tok/s", "ratio", "perplexity", "over it"), shown
    )
    print_json("peers", {"prompt": counts["prefill"], "tokens": counts["decode"] + 1, "runtimes": result})


def _python(kind: str) -> str:
    return str(CACHE / kind / "bin" / "python")


def _install(kind: str) -> None:
    place, done = CACHE / kind, CACHE / kind / "installed"
    if not done.exists():
        click.echo(f"installing {', '.join(PACKAGES[kind])} into {place}")
        venv.create(place, with_pip=True, clear=True)
        _checked([_python(kind), "-m", "pip", "install", "-q", *PACKAGES[kind]])
        done.touch()


def _checked(command: list[object]) -> None:
    finished = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if finished.returncode:
        lines = (finished.stderr or finished.stdout).strip().splitlines()
        raise click.ClickException(lines[-1] if lines else f"code {finished.returncode}")


if __name__ == "__main__":
    main()
