"""Real prompts: three chats and three pieces of prose, as token ids."""

from pathlib import Path

import numpy as np

from dash_export import DashRuntime

CHATS = [
    [{"role": "user", "content": "What is gravity? Answer in two sentences."}],
    [
        {"role": "system", "content": "You are a cook who answers with short recipes."},
        {"role": "user", "content": "I have eggs, 3 tomatoes and half a baguette. What can I make in 15 minutes?"},
    ],
    [
        {"role": "user", "content": "Name a town by the sea."},
        {"role": "assistant", "content": "Brighton."},
        {
            "role": "user",
            "content": "Write a Python function that adds two numbers, then tell me about that town's café ☕.",
        },
    ],
]
PROSE_TOKENS = 48


def prompts(runtime: DashRuntime) -> list[np.ndarray]:
    """Token ids of every prompt."""
    prose = runtime.text.encode((Path(__file__).parents[1] / "data" / "prose.txt").read_text(encoding="utf-8"))
    pieces = [prose[start : start + PROSE_TOKENS] for start in (0, 1200, 2600)]
    return [np.array(ids, np.int64) for ids in [*map(runtime.text.chat, CHATS), *pieces]]
