"""Ask the same question at several budgets, beside dense: `python examples/compare_budgets.py my.dash 0.95 0.9`."""

from __future__ import annotations

import argparse

from dash_export import DashRuntime

QUESTION = [{"role": "user", "content": "Why is the sky blue?"}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle")
    parser.add_argument("budgets", type=float, nargs="*", help="fractions of dense decode time")
    parser.add_argument("--target")
    parser.add_argument("--tokens", type=int, default=48)
    options = parser.parse_intermixed_args()  # budgets may follow --target

    runtime = DashRuntime.load(options.bundle, options.target)
    dense: list[int] = []
    for budget in (None, *options.budgets):
        steps = list(runtime.chat(QUESTION, options.tokens, budget=budget))
        tokens, figures = [step.token for step in steps], steps[-1].statistics
        dense = dense or tokens
        same = next((i for i, (a, b) in enumerate(zip(dense, tokens, strict=False)) if a != b), len(tokens))
        print(f"budget {budget or 'none (dense)'}: {figures.layers_per_token:.1f} layers a token,", end=" ")
        print(f"{figures.tokens_per_second:.1f} tokens/s, the first {same} tokens as dense")
        print(f"  {''.join(step.text for step in steps)!r}")


if __name__ == "__main__":
    main()
