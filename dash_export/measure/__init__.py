"""Measuring what skipping costs and saves: scores of texts and tasks, decode times, rates, frontier, profile,
pictures, report.

This file holds the defaults of all measurements, and imports nothing.
"""

LIMIT = 32
"""Most windows of a text, items of a task, or pictures."""
WINDOW = 256
PREFIX = 64
"""Tokens at the beginning of a window that are dense, like a prompt, and not scored."""
ROUNDS, TOKENS = 10, 128
"""Processes that time each candidate of a frontier, and the tokens that each decodes."""
BENCH_PROMPT, BENCH_ROUNDS = 512, 6
"""Tokens of a prompt, and processes that time each setting: six give an interval."""
PROFILE_ROUNDS, PROFILE_TOKENS, TRACE_TOKENS = 8, 64, 8
