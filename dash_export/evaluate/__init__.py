"""Measuring what skipping costs and saves: scores of texts and tasks, decode times, frontier, profile, pictures,
report.

Here are the defaults of what is measured; nothing is imported.
"""

LIMIT = 32
"""Windows of a text, or items of a task file."""
WINDOW = 256
PREFIX = 64
"""Tokens of a window that are dense, like a prompt: nobody is charged for them."""
DENSE_SHARE = 0.5
"""Part of an answer task's context that is dense."""
ROUNDS, TOKENS = 10, 128
"""Processes that time each candidate of a frontier, and the tokens that each decodes."""
PROFILE_ROUNDS, PROFILE_TOKENS, TRACE_TOKENS = 8, 64, 8
