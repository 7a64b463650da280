"""How a model is cut into engines: never-gated neighbours are merged, embed and head included."""

from __future__ import annotations

from collections.abc import Sequence

from dash_export.bundle import Segment


def plan_segments(num_layers: int, gated: Sequence[int], merge: bool = True) -> tuple[Segment, ...]:
    """Cut before and after every gated layer. Without `merge` embed, head and every layer stand alone (an empty range
    of layers
    marks embed and head)."""
    gated_set = set(gated)
    embed = Segment(0, -1, True, False, False)
    head = Segment(num_layers, num_layers - 1, False, True, False)
    if not merge:
        return (embed, *(Segment(layer, layer, False, False, layer in gated_set) for layer in range(num_layers)), head)
    segments: list[Segment] = []
    first = 0
    for layer in range(num_layers):
        if layer == num_layers - 1 or layer in gated_set or layer + 1 in gated_set:
            is_gated = layer in gated_set
            segments.append(Segment(first, layer, first == 0, layer == num_layers - 1 and not is_gated, is_gated))
            first = layer + 1
    return (*segments, head) if segments[-1].gated else tuple(segments)
