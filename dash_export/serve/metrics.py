"""Metrics for Prometheus: durations under OpenTelemetry's names for servers of language models, and our own counts of
layers skipped. A log of answers, for who listens to it. No text of a prompt or an answer is in either.
"""

import json
import logging
import time
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import numpy.typing as npt
from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from dash_export.serve.answers import Answer, dash
from dash_export.serve.tickets import Queue

log = logging.getLogger("dash_export.answers")
"""At level INFO: every answer that has ended, as a line of JSON."""
_COUNTERS = {
    "requests": "Requests that were taken.",
    "refused": "Requests refused: the queue was full, too many grammars, or the server closes.",
    "finished": "Answers that ended well.",
    "failed": "Answers that ended with an error.",
    "cancelled": "Answers that ended early, because their clients left.",
    "prompt_tokens": "Tokens of prompts.",
    "known_tokens": "Tokens of prompts that were not computed again.",
    "tokens": "Tokens of answers.",
}
# The bounds that OpenTelemetry's conventions name, in seconds.
_DURATIONS = tuple(0.01 * 2**power for power in range(14))
_FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
_TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)


class Metrics:
    """All counters and measurements of a server."""

    def __init__(self, served: Mapping[str, Queue]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Schedulers(served))
        ProcessCollector(registry=self._registry)

        def seconds(name: str, text: str, bounds: Iterable[float], *labels: str) -> Histogram:
            known = ("gen_ai_operation_name", "gen_ai_request_model", *labels)
            return Histogram(
                f"gen_ai_server_{name}", text, known, unit="seconds", buckets=tuple(bounds), registry=self._registry
            )

        self._duration = seconds("request_duration", "From asking to the last token.", _DURATIONS, "error_type")
        self._first = seconds("time_to_first_token", "From asking to the first token.", _FIRST)
        self._token = seconds("time_per_output_token", "Mean time of each token after the first.", _TOKEN)
        text, labels = "Layers of decoded tokens, or of pictures or texts.", ("model", "layer", "state")
        self._layers = Counter("dash_export_layers", text, labels, registry=self._registry)

    def answered(self, operation: str, model: str, answer: Answer) -> None:
        """Record an answer that has ended, well or with an error."""
        began, first, last, tokens = answer.began, answer.first, answer.last, answer.statistics.tokens
        self._duration.labels(operation, model, answer.error_type).observe(last - began)
        if answer.finish_reason and tokens:
            self._first.labels(operation, model).observe(first - began)
            if tokens > 1:
                self._token.labels(operation, model).observe((last - first) / (tokens - 1))
        if answer.actions:
            self._count_layers(model, np.array(answer.actions))
        if log.isEnabledFor(logging.INFO):
            facts: dict[str, object] = {
                "prompt_tokens": answer.statistics.prompt_tokens,
                "tokens": tokens,
                "seconds": round(last - began, 4),
                "first_token_seconds": round(first - began, 4),
            }
            _log(operation, model, answer.error_type or answer.finish_reason, facts | dash([answer]))

    def encoded(
        self, model: str, takes: str, seconds: float, actions: npt.NDArray[np.int8], told: Mapping[str, object]
    ) -> None:
        """Record a request whose pictures or texts (`takes`) have been encoded: `actions` [inputs, layers]; `told`, for
        the log.
        """
        self._duration.labels("embeddings", model, "").observe(seconds)
        self._count_layers(model, actions)
        _log("embeddings", model, "stop", {takes: len(actions), "seconds": round(seconds, 4), **told})

    def _count_layers(self, model: str, actions: npt.NDArray[np.int8]) -> None:
        for layer, skipped in enumerate(actions.sum(axis=0, dtype=np.int64).tolist()):
            self._layers.labels(model, layer, "skipped").inc(skipped)
            self._layers.labels(model, layer, "run").inc(len(actions) - skipped)

    def exposition(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self._registry)


def _log(operation: str, model: str, ended: str, facts: Mapping[str, object]) -> None:
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    log.info(json.dumps({"time": now, "operation": operation, "model": model, "ended": ended, **facts}))


class _Schedulers(Collector):
    def __init__(self, served: Mapping[str, Queue]) -> None:
        self._served = served

    def collect(self) -> Iterator[Metric]:
        for name, text in _COUNTERS.items():
            counter = CounterMetricFamily(f"dash_export_{name}", text, labels=["model"])
            for model, one in self._served.items():
                counter.add_metric([model], one.figures[name])
            yield counter
        for name, text in (("waiting", "Requests in the queue."), ("running", "Rows that decode.")):
            gauge = GaugeMetricFamily(f"dash_export_{name}", text, labels=["model"])
            for model, one in self._served.items():
                gauge.add_metric([model], getattr(one, name))
            yield gauge
