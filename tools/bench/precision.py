"""What a build's weight precision costs in quality: KL, top-1 agreement and perplexity against another build of the
same bundle.

python tools/bench/precision.py BUNDLE --text FILE --base cpu-fp32 --target cpu --target cpu-int8
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
from common import print_json
from rich.console import Console
from rich.table import Table

from dash_export.divergence import DenseRows, surprise
from dash_export.evaluation.text import windows as text_windows
from dash_export.resources import resource_folder
from dash_export.runtime import DashRuntime
from dash_export.text_files import read_text

HELD_OUT = resource_folder("calibration") / "heldout.txt"


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--target", "targets", multiple=True, default=("cpu", "cpu-int8"), show_default=True)
@click.option("--base", default="cpu-fp32", show_default=True, help="The build to compare with.")
@click.option("--text", type=click.Path(exists=True, path_type=Path), default=HELD_OUT, help="Held-out text.")
@click.option("--windows", default=12, show_default=True)
@click.option("--tokens", default=256, show_default=True, help="Tokens per window.")
def main(bundle: Path, targets: tuple[str, ...], base: str, text: Path, windows: int, tokens: int) -> None:
    """Dense passes over windows of the text, every build on the same ones."""
    reference = DashRuntime.load(bundle, base, dispatch="plain")
    parts = text_windows(reference, read_text(text), text.name, windows, tokens)
    table = Table(
        "build",
        "KL nats/token",
        "top-1 agreement",
        "perplexity",
        "against base",
        title=f"{bundle.name}, {text.name}, {len(parts)} x {tokens} tokens",
    )
    session = reference.session()
    expected = [(DenseRows(rows), rows.argmax(axis=-1)) for rows in map(session.logits, parts)]
    results: dict[str, object] = {"text": text.name, "windows": len(parts), "tokens": tokens}
    base_perplexity = 0.0
    for target in (base, *targets):
        session = DashRuntime.load(bundle, target, dispatch="plain").session()
        kl, agree, nll = [], [], []
        for part, (want, likely) in zip(parts, expected, strict=True):
            got = session.logits(part)
            kl.append(want.kl(got))
            agree.append(got.argmax(axis=-1) == likely)
            nll.append(surprise(got, part[1:]))
        perplexity = float(np.exp(np.concatenate(nll).mean()))
        base_perplexity = base_perplexity or perplexity
        row = {
            "kl": float(np.concatenate(kl).mean()),
            "top1": float(np.concatenate(agree).mean()),
            "perplexity": perplexity,
        }
        results[target] = {name: round(value, 5) for name, value in row.items()}
        table.add_row(
            target,
            f"{row['kl']:.4f}",
            f"{row['top1']:.3f}",
            f"{perplexity:.3f}",
            f"{perplexity / base_perplexity - 1:+.2%}",
        )
    Console().print(table)
    print_json("precision", results)


if __name__ == "__main__":
    main()
