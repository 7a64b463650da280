"""Put what another model sees between the words of a prompt, and read the states that answer it.

A vision-language model is an encoder, a projector and a language model: this is the part of the last one. The encoder
and the projector are random here: `python examples/embeddings.py my.dash`.
"""

from __future__ import annotations

import argparse

import numpy as np

from dash_export import DashRuntime

PATCHES, FEATURES = 16, 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle")
    parser.add_argument("--target")
    parser.add_argument("--tokens", type=int, default=12)
    options = parser.parse_args()

    session = DashRuntime.load(options.bundle, options.target).session()
    words = session.embed("The picture shows")  # [n, hidden], as they enter the first layer
    rng = np.random.default_rng(0)
    projector = rng.standard_normal((FEATURES, words.shape[1]), np.float32) * words.std() / FEATURES**0.5
    picture = rng.standard_normal((PATCHES, FEATURES), np.float32) @ projector

    session.prefill(embeddings=np.concatenate([words, picture]))
    for response in session.stream(" a", options.tokens):  # the rest of the prompt are tokens again
        print(response.text, end="", flush=True)
    print(f"\nstate of the last token, for a head of your own: {session.hidden.shape}")


if __name__ == "__main__":
    main()
