"""Whether `score` says what decode does: decisions, and the perplexity that they give, on held-out text.

    python tools/bench/agreement.py BUNDLE --skipped 5

Quality is judged by teacher-forced passes over many tokens, and answers are decoded token by token. In fp32 both do the
same (tests/runtime); in int4 ONNX Runtime's kernels for one row and for several differ in their last bits, and a damage
that lies near its limit may then fall on its other side.
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
from common import print_json
from precision import HELD_OUT, log_softmax
from rich.progress import track

from dash_export import DashRuntime
from dash_export.decision import DecisionRule, Setting


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
    setting, gated = Setting("token", skipped=skipped), list(runtime.bundle.manifest.policy.gated)
    session = runtime.session_with(setting)
    rule = session.rule
    assert isinstance(rule, DecisionRule)
    limits = np.array(rule.limits)[gated]
    ids = np.array(runtime.text.encode(text.read_text(encoding="utf-8")), np.int64)
    prefix = tokens // 2
    decisions, apart, likelihoods = 0, [], []
    for start in track(np.linspace(0, len(ids) - tokens, windows).astype(int), "windows"):
        part = ids[start : start + tokens]
        score = session.score(part, prefix=prefix)
        session.reset()
        session.prefill(part[:prefix])
        decoded = []
        for position in range(prefix, tokens - 1):
            logits, actions = session.decode_one(int(part[position]))
            differ = actions[gated] != score.actions[position, gated]
            apart += (np.abs(score.damage[position, gated] / limits - 1)[differ]).tolist()
            decoded.append(log_softmax(logits)[part[position + 1]])
        decisions += len(decoded) * len(gated)
        likelihoods.append((np.mean(decoded), score.log_likelihoods[prefix:].mean()))
    decode, teacher = np.exp(-np.mean(likelihoods, axis=0))
    far = np.array(apart or [0.0])
    print(
        f"{len(apart)} of {decisions} decisions differ ({len(apart) / decisions:.2%}): their damage lies "
        f"{np.median(far):.1%} from the limit, {far.max():.1%} at most. "
        f"Perplexity decoded {decode:.3f}, as scored {teacher:.3f}."
    )
    result = {"target": target, "skipped": skipped, "decisions": decisions, "differ": len(apart)}
    result |= {"median_distance": float(np.median(far)), "largest_distance": float(far.max())}
    print_json("agreement", result | {"perplexity_decoded": float(decode), "perplexity_scored": float(teacher)})


if __name__ == "__main__":
    main()
