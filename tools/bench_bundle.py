"""The bundle that the benchmarks measure: SmolLM2-135M-Instruct with the policy that the demo runs, at every precision.

python tools/bench_bundle.py          # prints the bundle's path; reuses what is there
"""

from __future__ import annotations

import sys
from pathlib import Path

from fetch import CACHE, SMOLLM2, UnavailableError, fetched

from dash_export import build, export
from dash_export.commands.progress import progress_bar
from dash_export.errors import DashError
from dash_export.models import open_checkpoint
from dash_export.policy import load_policy

RECIPES = Path(__file__).parent / "bench" / "recipes"


def main() -> None:
    """Export and build."""
    checkpoint = open_checkpoint(fetched(SMOLLM2))
    policy = load_policy("smollm2-135m-instruct", checkpoint.spec)
    with progress_bar("export") as progress:
        bundle = export(checkpoint, CACHE / "bench.dash", policy, progress)
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
