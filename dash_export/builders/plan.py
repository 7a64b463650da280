"""How a model is cut into engines: each unit is one, and so are the layers between two, embed and head included."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import pairwise

from dash_export.decision import Unit
from dash_export.manifest import Manifest, Segment


def build_segments(manifest: Manifest, on_device: bool) -> tuple[Segment, ...]:
    """The segments of a build. On a device the policy is an engine of its own and reads what an engine gave."""
    policy = manifest.policy
    cut = (policy.read,) if on_device and policy.has_network else ()
    return plan_segments(manifest.model.num_layers, policy.units, cut)


def plan_segments(num_layers: int, units: Sequence[Unit], cut: Collection[int] = ()) -> tuple[Segment, ...]:
    """Cut before and after every unit, and before the layers in `cut`: what enters those is an engine's output, which
    a policy of its own can read. Embed or head stand alone where nothing that always runs is next to them.
    """
    ends = {0, num_layers, *cut, *(unit.first for unit in units), *(unit.last + 1 for unit in units)}
    firsts = {unit.first for unit in units}
    segments = []
    for first, stop in pairwise(sorted(ends)):
        gated = first in firsts
        segments.append(Segment(first, stop - 1, first == 0 and 0 not in cut, stop == num_layers and not gated, gated))
    embed = [Segment(0, -1, True, False, False)] if 0 in cut else []
    head = [Segment(num_layers, num_layers - 1, False, True, False)] if segments[-1].gated else []
    return (*embed, *segments, *head)
