"""Decode several prompts together, answers as they come: `python examples/several.py my.dash`."""

from __future__ import annotations

import argparse

from dash_export import DashRuntime

PROMPTS = ["One day", "The sea is", "In the beginning", "My dear friend"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle")
    parser.add_argument("--target", help="default: cpu, or the only one that is built")
    parser.add_argument("--size", type=int, default=2, help="sequences decoded together")
    options = parser.parse_args()

    batch = DashRuntime.load(options.bundle, options.target).batch(options.size)
    texts = [""] * len(PROMPTS)
    for index, step in batch.stream(PROMPTS, max_tokens=16):
        texts[index] += step.text
        if step.finish_reason is not None:  # the next prompt takes its place
            print(f"{PROMPTS[index]!r}: {texts[index]!r} ({step.error or step.finish_reason})")


if __name__ == "__main__":
    main()
