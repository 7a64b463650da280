"""Whether `score` says what decode does: decisions, and the perplexity that they give, on held-out text.

    python tools/bench/agreement.py BUNDLE --skipped 5

Quality is judged by teacher-forced passes over many tokens, and answers are decoded token by token. In fp32 both do the
same (tests/runtime); in int4 ONNX Runtime's kernels for one row and for several differ in their last bits, so that a
decision that lies near its limit may fall the other way, and every one after it reads slightly other states.
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
from common import print_json
from rich.progress import track

from dash_export import DashRuntime
from dash_export.decision import Setting
from dash_export.divergence import surprise
from dash_export.evaluation.text import windows as windows_of
from dash_export.resources import resource_folder
from dash_export.text_files import read_text

HELD_OUT = resource_folder("calibration") / "heldout.txt"


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--target", default="cpu", show_default=True)
@click.option("--text", type=click.Path(exists=True, path_type=Path), default=HELD_OUT, help="Held-out text.")
@click.option("--skipped", default=5.0, show_default=True, help="Layers skipped per token, on average.")
@click.option("--windows", default=12, show_default=True)
@click.option("--tokens", default=256, show_default=True, help="Tokens per window, half of them decoded.")
def main(bundle: Path, target: str, text: Path, skipped: float, windows: int, tokens: int) -> None:
    """Each window both ways."""
    runtime = DashRuntime.load(bundle, target)
    firsts = [unit.first for unit in runtime.bundle.manifest.policy.units]
    session = runtime.session_with(Setting("token", skipped=skipped))
    prefix = tokens // 2
    differ, likelihoods, taken = [], [], []
    for part in track(windows_of(runtime, read_text(text), text.name, windows, tokens), "windows"):
        score = session.score(part, prefix=prefix)
        session.reset()
        session.prefill(part[:prefix])
        decoded = []
        for position in range(prefix, tokens - 1):
            logits, actions = session.decode_one(int(part[position]))
            differ.append(actions[firsts] != score.actions[position, firsts])
            decoded.append(-surprise(logits[None], part[position + 1 : position + 2])[0])
            taken.append((actions.sum(), score.actions[position].sum()))
        likelihoods.append((np.mean(decoded), score.log_likelihoods[prefix:].mean()))
    decode, teacher = np.exp(-np.mean(likelihoods, axis=0)).tolist()
    share, tokens_apart = float(np.mean(differ)), float(np.any(differ, axis=1).mean())
    skips = np.mean(taken, axis=0).tolist()
    print(
        f"Of {np.size(differ)} decisions {share:.2%} differ, in {tokens_apart:.1%} of {len(differ)} tokens. Skipped "
        f"{skips[0]:.3f} layers decoding, {skips[1]:.3f} scoring; perplexity {decode:.3f} and {teacher:.3f}."
    )
    result = {"target": target, "decisions": int(np.size(differ)), "differ": share, "tokens_with_one": tokens_apart}
    print_json("agreement", result | {"skipped": skips, "perplexity": [decode, teacher]})


if __name__ == "__main__":
    main()
