"""Policy files side by side on the same held-out windows, without quantisation.

    python tools/bench/policies.py MODEL A.safetensors B.safetensors --tokenizer BUNDLE --text novels.txt

Of every --text the last 8 % count, which no training has read; a --held file is judged on whole, and so are the model's
own answers to --prompts: give files that no training has read. Between two points of a dial KL is taken to be a power
of the layers skipped.
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

from dash_export.evaluation.comparison import power_at
from dash_export.models import open_checkpoint
from dash_export.policy.continuations import continue_prompts
from dash_export.policy.corpus import Passage, read_corpus, read_prompts
from dash_export.policy.figures import JUDGED_SEED, SIZES, held_out_batches, token_figures
from dash_export.policy.gated_model import GatedModel
from dash_export.policy.precision import PRECISIONS
from dash_export.policy.settings import TrainingSettings
from dash_export.policy.skip_modules import SkipModules
from dash_export.policy.train import told_apart
from dash_export.policy_file import load_policy
from dash_export.runtime.text import Text
from dash_export.skip_policy import check_model

FILE = click.Path(exists=True, path_type=Path)


@click.command()
@click.argument("model", type=FILE)
@click.argument("policies", type=FILE, nargs=-1, required=True)
@click.option("--tokenizer", type=FILE, required=True, help="A bundle of the model.")
@click.option("--text", type=FILE, multiple=True, help="Its last 8 % are judged on.")
@click.option("--held", type=FILE, multiple=True, help="Judged on whole.")
@click.option("--prompts", type=FILE, multiple=True, help="Chat prompts (.jsonl); the model's answers are judged on.")
@click.option("--precision", type=click.Choice(tuple(PRECISIONS)), default="bfloat16", show_default=True)
@click.option("--batches", default=24, show_default=True, help="Of 4 windows of 256 tokens.")
@click.option("--points", default=8, show_default=True, help="Of the dial.")
def main(
    model: Path,
    policies: tuple[Path, ...],
    tokenizer: Path,
    text: tuple[Path, ...],
    held: tuple[Path, ...],
    prompts: tuple[Path, ...],
    precision: str,
    batches: int,
    points: int,
) -> None:
    """KL from dense and nll at every policy's own settings, and interpolated at 2, 4, 5, 6 and 8 skipped layers."""
    told_apart((*text, *held, *prompts))
    settings = TrainingSettings()
    checkpoint = open_checkpoint(model)
    gated_model = GatedModel(checkpoint, torch.device("cpu"), PRECISIONS[precision])
    words = Text(tokenizer)
    _, corpus = read_corpus(text, words.tokenizer, settings.window, settings.held_out)
    for path in held:
        ids = np.array(words.encode(path.read_text(encoding="utf-8"), special=False), np.int64)
        corpus.sources[path.stem] = [Passage(ids)]
    for path in prompts:
        asked = [np.array(words.chat(chat)[-settings.window :], np.int64) for chat in read_prompts(path)]
        corpus.sources[path.stem] = continue_prompts(
            gated_model, asked, settings.own_tokens, words.eos_ids, JUDGED_SEED
        )
    windows = held_out_batches(corpus, settings.windows, settings.window, batches)
    at = (*SIZES[:2], 5, *SIZES[2:])
    table = Table("policy", "kind", *(f"{size} skipped: KL, perplexity" for size in at))
    result: dict[str, Any] = {"tokens": corpus.tokens()}
    for path in policies:
        policy = load_policy(path, checkpoint.spec)
        check_model(policy, checkpoint)
        judged, figures = token_figures(
            gated_model, SkipModules(policy), windows, policy.static_order, settings.trade_offs, points=points
        )
        result |= {"judged": judged, str(path): figures}
        for kind in ("token", "static", "random"):
            rows = [row for row in figures if str(row["setting"]).partition(",")[0] in ("dense", kind)]
            if len(rows) > 1:
                skipped, kl, nll = (np.array([row[name] for row in rows], float) for name in ("skipped", "kl", "nll"))
                within = np.array(at) < skipped.max() + 0.2
                kls = np.where(within, power_at(at, skipped[1:], kl[1:]), np.nan)
                more = np.where(within, np.exp(np.interp(at, skipped, nll) - nll[0]) - 1, np.nan)
                shown = zip(kls, more, strict=True)
                table.add_row(str(path), kind, *(f"{value:.3f}, {rise:+.1%}" for value, rise in shown))
    Console(width=160).print(table)
    print_json("policies", result)


if __name__ == "__main__":
    main()
