"""From a model of your own to an answer, without a policy: `python examples/own_model.py MODEL my.dash`.

MODEL is a Hugging Face folder, a hub id or a GGUF file. `dash-export train` makes a policy for it.
"""

from __future__ import annotations

import argparse

from dash_export import DashRuntime, build, export
from dash_export.models import open_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("bundle")
    parser.add_argument("--weights", default="int8", help="int4 is smaller and faster, and takes minutes to calibrate")
    options = parser.parse_args()

    bundle = export(open_checkpoint(options.model), options.bundle)
    made = build(bundle, "cpu", weights=options.weights)
    runtime = DashRuntime.load(options.bundle, made.target)
    print(runtime.generate("The sea is", 16).text)
    score = runtime.score("The quick brown fox jumps over the lazy dog.")
    print(f"built as {made.target}; perplexity of a sentence: {score.perplexity:.1f}")


if __name__ == "__main__":
    main()
