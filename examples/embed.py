"""Answer one question inside your own program: `python examples/embed.py my.dash --budget 0.9`."""

from __future__ import annotations

import argparse

from dash_export import DashRuntime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle")
    parser.add_argument("--target", help="default: cpu, or the only one that is built")
    parser.add_argument("--budget", type=float, help="mean decode time wanted, as a fraction of dense")
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()

    runtime = DashRuntime.load(options.bundle, options.target)  # once per process: engines are shared
    session = runtime.session(budget=options.budget)  # one per conversation and thread
    last = None
    for last in session.chat([{"role": "user", "content": "Name three rivers."}], options.tokens):
        print(last.text, end="", flush=True)
    assert last is not None
    figures = last.statistics
    print(f"\n{figures.tokens_per_second:.1f} tokens/s, {figures.layers_per_token:.1f} layers a token")


if __name__ == "__main__":
    main()
