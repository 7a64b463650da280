"""Show each token with the layers it ran, and stop from another thread: `python examples/stream.py my.dash`."""

from __future__ import annotations

import argparse
from threading import Timer

from dash_export import DashRuntime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle")
    parser.add_argument("--target", help="default: cpu, or the only one that is built")
    parser.add_argument("--trade-off", type=float, default=0.7, help="higher skips more")
    parser.add_argument("--seconds", type=float, default=10, help="the answer is cancelled after so long")
    options = parser.parse_args()

    session = DashRuntime.load(options.bundle, options.target).session(trade_off=options.trade_off)
    timer = Timer(options.seconds, session.cancel)
    timer.start()
    for step in session.stream("The sea is", max_tokens=48):
        run = len(step.actions) - int(step.actions.sum())  # actions: one per layer, 0 run, 1 skip
        print(f"{step.text!r:16} {run:3} layers {1e3 * step.seconds:7.2f} ms")
    timer.cancel()
    print("ended by", step.finish_reason)


if __name__ == "__main__":
    main()
