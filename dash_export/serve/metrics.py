"""Counters of the schedulers, in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Mapping

from dash_export.serve.scheduler import Scheduler

_COUNTERS = {
    "requests": "Requests that were taken.",
    "refused": "Requests refused because the queue was full.",
    "finished": "Answers that ended well.",
    "failed": "Answers that ended with an error.",
    "prompt_tokens": "Tokens of prompts.",
    "known_tokens": "Tokens of prompts that were not computed again.",
    "tokens": "Tokens of answers.",
}


def exposition(served: Mapping[str, Scheduler]) -> str:
    """All counters and gauges, by model."""
    lines = []
    for name, text in _COUNTERS.items():
        metric = f"dash_export_{name}_total"
        lines += [f"# HELP {metric} {text}", f"# TYPE {metric} counter"]
        lines += [f"{metric}{_label(model)} {getattr(one.figures, name)}" for model, one in served.items()]
    for name, text in (("waiting", "Requests in the queue."), ("running", "Rows that decode.")):
        metric = f"dash_export_{name}"
        lines += [f"# HELP {metric} {text}", f"# TYPE {metric} gauge"]
        lines += [f"{metric}{_label(model)} {getattr(one, name)}" for model, one in served.items()]
    paced = [(model, one.pace.granted) for model, one in served.items() if one.pace]
    if paced:
        lines += [
            "# HELP dash_export_budget Granted to requests that do not say it.",
            "# TYPE dash_export_budget gauge",
        ]
        lines += [f"dash_export_budget{_label(model)} {granted:.4f}" for model, granted in paced]
    return "\n".join(lines) + "\n"


def _label(model: str) -> str:
    return '{model="' + model.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n") + '"}'
