"""Policy files side by side on the same held-out windows, in training's own bf16, without quantisation.

    python tools/bench/policies.py MODEL A.safetensors B.safetensors --tokenizer BUNDLE --text novels.txt

Of every --text the last 8 % count, which no training has read; a --held file is judged on whole.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from common import print_json
from rich.console import Console
from rich.table import Table

from dash_export.models import open_checkpoint
from dash_export.policy.corpus import Passage, read_corpus
from dash_export.policy.figures import SIZES, held_out_batches, token_figures
from dash_export.policy.gated_model import GatedModel
from dash_export.policy.settings import TrainingSettings
from dash_export.policy.skip_modules import SkipModules
from dash_export.policy_file import load_policy
from dash_export.runtime.text import Text

FILE = click.Path(exists=True, path_type=Path)


@click.command()
@click.argument("model", type=FILE)
@click.argument("policies", type=FILE, nargs=-1, required=True)
@click.option("--tokenizer", type=FILE, required=True, help="A bundle of the model.")
@click.option("--text", type=FILE, multiple=True, help="Its last 8 % are judged on.")
@click.option("--held", type=FILE, multiple=True, help="Judged on whole.")
@click.option("--batches", default=24, show_default=True, help="Of 4 windows of 256 tokens.")
@click.option("--points", default=8, show_default=True, help="Of the dial: what lies between two comes out too high.")
def main(
    model: Path,
    policies: tuple[Path, ...],
    tokenizer: Path,
    text: tuple[Path, ...],
    held: tuple[Path, ...],
    batches: int,
    points: int,
) -> None:
    """KL from dense and nll at every policy's own settings, and interpolated at 2, 4, 5, 6 and 8 skipped layers."""
    settings = TrainingSettings()
    checkpoint = open_checkpoint(model)
    gated_model = GatedModel(checkpoint, torch.device("cpu"), torch.bfloat16)
    words = Text(tokenizer)
    _, corpus = read_corpus(text, words.tokenizer, settings.window, settings.held_out)
    for path in held:
        ids = np.array(words.encode(path.read_text(encoding="utf-8"), special=False), np.int64)
        corpus.sources[path.stem] = [Passage(ids)]
    windows = held_out_batches(corpus, settings.windows, settings.window, batches)
    at = (*SIZES[:2], 5, *SIZES[2:])
    table = Table("policy", "kind", *(f"{size} skipped: KL, perplexity" for size in at))
    result: dict[str, Any] = {"tokens": corpus.tokens()}
    for path in policies:
        policy = load_policy(path, checkpoint.spec)
        judged, figures = token_figures(
            gated_model, SkipModules(policy), windows, policy.static_order, settings.trade_offs, points=points
        )
        result |= {"judged": judged, path.stem: figures}
        for kind in ("token", "static", "random"):
            rows = [row for row in figures if str(row["setting"]).partition(",")[0] in ("dense", kind)]
            if len(rows) > 1:
                skipped, kl, nll = (np.array([row[name] for row in rows], float) for name in ("skipped", "kl", "nll"))
                kls, nlls = (
                    np.where(np.array(at) < skipped.max() + 0.2, np.interp(at, skipped, values), np.nan)
                    for values in (kl, nll)
                )
                shown = zip(kls, np.exp(nlls - nll[0]) - 1, strict=True)
                table.add_row(path.stem, kind, *(f"{value:.3f}, {more:+.1%}" for value, more in shown))
    Console(width=160).print(table)
    print_json("policies", result)


if __name__ == "__main__":
    main()
