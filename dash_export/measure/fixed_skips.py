"""Perplexity that skipping the same layers for every token costs, measured in seconds and kept in the cache folder."""

import json
from contextlib import suppress
from math import exp, isfinite

import numpy as np

from dash_export.bundle.layout import cache_folder
from dash_export.core.kinds import Setting
from dash_export.errors import DashError
from dash_export.files.artifacts import Progress, content_key, no_progress, read_bounded, write_atomic
from dash_export.files.resources import resource_folder
from dash_export.runtime import DashRuntime

WINDOWS, TOKENS, DENSE = 4, 128, 32
"""Windows of the shipped prose, tokens of each, and how many of these are dense, like a prompt."""


def perplexity_factor(runtime: DashRuntime, skip: tuple[int, ...], progress: Progress = no_progress) -> float:
    """Return perplexity on some windows of the shipped prose with these layers skipped, over dense's. It is measured
    once for a build and these layers; where the cache folder cannot be written, each time.
    """
    build = runtime.build
    engines = {name: engine.key for name, engine in build.engines.items()}
    file = cache_folder() / "skips" / f"{content_key(build.bundle_key, engines, skip)}.json"
    with suppress(OSError, ValueError, TypeError):
        if isfinite(known := float(json.loads(read_bounded(file, 100)))):
            return known
    progress("measuring what skipping these layers costs", 0, 0)
    text = (resource_folder("calibration") / "prose.txt").read_text(encoding="utf-8")
    windows = runtime.text.windows(text, WINDOWS, min(TOKENS, runtime.engines.model.max_positions))
    means = []
    for setting in (Setting(), Setting(skip=skip)):
        session = runtime.session_with(setting)
        means.append(np.concatenate([session.score(ids, DENSE).log_likelihoods[DENSE:] for ids in windows]).mean())
    factor = exp(float(means[0] - means[1]))
    with suppress(OSError, DashError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, json.dumps(factor))
    return factor
