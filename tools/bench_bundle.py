"""The bundle that the benchmarks measure: SmolLM2-135M-Instruct with an untrained token policy, at every precision.

    python tools/bench_bundle.py          # prints the bundle's path; reuses what is there

23 of the 30 layers are gated: all but the ends and those whose loss hurts most (layers 2, 8 and 11).
"""

from __future__ import annotations

import sys
from pathlib import Path

from smollm2 import CACHE, UnavailableError, smollm2_gguf

from dash_export import build, export
from dash_export.commands.progress import progress_bar
from dash_export.errors import DashError
from dash_export.models import open_checkpoint
from dash_export.skip_policy import untrained_policy

GATED = (*range(3, 8), 9, 10, *range(12, 28))
RECIPES = Path(__file__).parent / "bench" / "recipes"


def main() -> None:
    """Export and build."""
    checkpoint = open_checkpoint(smollm2_gguf())
    with progress_bar("export") as progress:
        bundle = export(checkpoint, CACHE / "bench.dash", untrained_policy(checkpoint.spec, GATED), progress)
    builds = [("cpu", None), ("cpu", "fp32"), ("cpu", "int8"), *((str(path), None) for path in RECIPES.glob("*.toml"))]
    for target, weights in builds:
        with progress_bar(f"build {Path(target).stem} {weights or ''}".strip()) as progress:
            build(bundle, target, weights=weights, progress=progress)
    print(bundle.root)


if __name__ == "__main__":
    try:
        main()
    except (DashError, UnavailableError) as error:
        sys.exit(f"Error: {error}")
