"""All engines of a build on the host, loaded: what sessions share."""

from __future__ import annotations

import logging

from dash_export.build_record import Build, Segment
from dash_export.bundle import Bundle
from dash_export.errors import BundleError
from dash_export.manifest import DAMAGED
from dash_export.names import PREFILL
from dash_export.runtime.backends.base import Backend, Engine
from dash_export.runtime.cache import KVCache
from dash_export.runtime.cpus import cpu_name, saturates_int8
from dash_export.runtime.dispatch import BoundStep
from dash_export.runtime.engines import SegmentEngines, policies_by_segment

logger = logging.getLogger(__name__)

SCORES = 32 << 20
"""Bytes of attention scores of one pass: what is larger, glibc maps and clears anew for every layer."""

SCORE_ROWS = 128
"""Teacher-forced steps keep the logits of all their tokens: 128 of a 50k vocabulary are 25 MB."""

FEWEST_TOKENS = 8
"""A pass of so many tokens of a prompt goes through the engine for prompts, where there is one: from 4 on it is faster,
but its weights are other memory than the layers' engines have just warmed.
"""


class EngineSet:
    """All engines of a build in one dispatch mode, shared between sessions."""

    def __init__(self, bundle: Bundle, build: Build, backend: Backend, dispatch: str) -> None:
        """`dispatch`: `plain` (no policy), `fused` (policies inside the engines before) or `sync` (policies as engines
        of their own).
        """
        self.model = bundle.manifest.model
        self.build = build
        self.dispatch = dispatch

        policy = bundle.manifest.policy

        def load(name: str, segment: Segment | None = None) -> Engine:
            # A missing policy is no damage, and no damage is always skipped.
            fused = dispatch == "fused" and segment is not None and policy.read_in(segment.layers) is not None
            name = f"{name}.policy" if fused else name
            if name not in build.engines:
                raise BundleError(f"{bundle.root}: the build for {build.target!r} has no engine {name}. {DAMAGED}")
            return backend.load(bundle.path(build.engines[name].file))

        self.gated, self.decision_points = policy.gated, policy.decision_points
        asked = self.decision_points if dispatch == "sync" else {}
        self.segments = [
            SegmentEngines(
                segment,
                load(segment.name, segment),
                load(f"skip_{segment.first:02d}", segment) if segment.gated else None,
                policies,
            )
            for segment, policies in zip(build.segments, policies_by_segment(build, asked, load), strict=True)
        ]
        self.answers = [group for item in self.segments for group in item.policies] or self.decision_points.values()
        self.stretches = [(stretch, load(stretch.name)) for stretch in build.stretches]
        self._for_prompts: list[SegmentEngines[Engine]] | None = None
        if PREFILL in build.engines and saturates_int8():
            logger.warning(
                "prompts go through the layers' engines: on %s sums of int8 products overflow, and the engine for "
                "prompts would be wrong",
                cpu_name(),
            )
        elif PREFILL in build.engines:
            whole = Segment.whole(self.model.num_layers)
            self._for_prompts = [SegmentEngines(whole, load(PREFILL), None, {})]
        engines = [
            engine
            for item in self.segments
            for engine in (item.run, item.skip, *item.policies.values())
            if engine is not None
        ]
        self.needs_mask = any("attention_mask" in engine.inputs for engine in engines)
        self.reads_history = any("actions" in engine.inputs for engine in engines)
        # A lowered linear policy leaves its bias and softplus to the host: cheaper than two more nodes.
        scored = any("score" in engine.outputs for engine in engines)
        if scored and not build.policy_bias:
            raise BundleError(f"{bundle.root}: the build for {build.target!r} lacks the policy's biases. {DAMAGED}")
        self.score_bias = dict(build.policy_bias) if scored else {}
        self.score_rows = SCORE_ROWS

    def rows_at_once(self, capacity: int) -> int:
        """As many tokens as one pass may hold over a cache of `capacity` rows, for their attention scores' sake."""
        return max(1, SCORES // (4 * self.model.num_heads * capacity))

    def cache(self, step: int, sequences: int = 1) -> KVCache:
        """A cache for one session, or for a batch of `sequences`, which grows by `step` rows."""
        return KVCache(self.model, step, sequences)

    def step(self, cache: KVCache, sequence: int, teacher_forced: bool = False, batch: int = 1) -> BoundStep:
        """These engines bound to one session's memory, or to that of the first `batch` sequences of a batch."""
        return BoundStep(self, cache, sequence, teacher_forced, batch)

    @property
    def prefills_apart(self) -> bool:
        """Whether there is an engine for prompts. It has one scale for all activations: not for the first positions,
        where single ones are a hundred times as large as any later.
        """
        return self._for_prompts is not None

    def prefill_step(self, cache: KVCache, sequence: int) -> BoundStep:
        """`step` for the tokens of a prompt, about which no policy is asked."""
        segments = self._for_prompts if sequence >= FEWEST_TOKENS else None
        return BoundStep(self, cache, sequence, segments=segments)
