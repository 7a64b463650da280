"""How a model is cut into engines: never-gated neighbours are merged, embed and head included."""

from __future__ import annotations

from collections.abc import Sequence

from dash_export.bundle import Segment


def plan_segments(
    num_layers: int, gated: Sequence[int], merge: bool = True, overlap: bool = False
) -> tuple[Segment, ...]:
    """Cut before and after every gated layer. Without `merge` embed, head and every layer stand alone (an empty range
    of layers marks embed and head).

    With `overlap` what stands before a gated layer (layer or embedding) is a segment of its own, so that the policy for
    the gated one runs beside it: an engine's outputs are usable only when all of it has ended.
    """
    gated_set = set(gated)
    embed = Segment(0, -1, True, False, False)
    head = Segment(num_layers, num_layers - 1, False, True, False)
    if not merge:
        return (embed, *(Segment(layer, layer, False, False, layer in gated_set) for layer in range(num_layers)), head)
    alone = overlap and 1 in gated_set
    segments: list[Segment] = [embed] if alone else []
    first = 0
    for layer in range(num_layers):
        cut = layer in gated_set or layer + 1 in gated_set or (overlap and layer + 2 in gated_set)
        if cut or layer == num_layers - 1:
            is_gated = layer in gated_set
            begins, ends = first == 0 and not alone, layer == num_layers - 1 and not is_gated
            segments.append(Segment(first, layer, begins, ends, is_gated))
            first = layer + 1
    return (*segments, head) if segments[-1].gated else tuple(segments)
