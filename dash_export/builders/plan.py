"""How a model is cut into engines: never-gated neighbours are merged, embed and head included; and which stretches of
gated layers are engines once more.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import pairwise

from dash_export.build_record import Segment, Stretch
from dash_export.stretches import LONGEST_STRETCH


def plan_segments(
    num_layers: int, gated: Sequence[int], merge: bool = True, alone: Collection[int] = ()
) -> tuple[Segment, ...]:
    """Cut before and after every gated layer. Without `merge` embed, head and every layer stand alone (an empty range
    of layers marks embed and head).

    `alone`: layers that are segments of their own too, so that policies that read their input run beside them: an
    engine's outputs are usable only when all of it has ended.
    """
    gated_set, apart = set(gated), {*gated, *alone}
    embed = Segment(0, -1, True, False, False)
    head = Segment(num_layers, num_layers - 1, False, True, False)
    if not merge:
        return (embed, *(Segment(layer, layer, False, False, layer in gated_set) for layer in range(num_layers)), head)
    embedded = 0 not in alone
    segments: list[Segment] = [] if embedded else [embed]
    first = 0
    for layer in range(num_layers):
        cut = layer in apart or layer + 1 in apart
        if cut or layer == num_layers - 1:
            is_gated = layer in gated_set
            begins, ends = first == 0 and embedded, layer == num_layers - 1 and not is_gated
            segments.append(Segment(first, layer, begins, ends, is_gated))
            first = layer + 1
    return (*segments, head) if segments[-1].gated else tuple(segments)


def plan_stretches(gated: Sequence[int], read: Collection[int]) -> tuple[Stretch, ...]:
    """Neighbours that are decided before any of them runs, because none of them is `read` by a policy: cut evenly into
    stretches that run, so that each layer is in one; and any two neighbours of one as one that skips.
    """
    groups: list[list[int]] = []
    for layer in gated:
        if layer in read:
            continue
        if groups and groups[-1][-1] == layer - 1:
            groups[-1].append(layer)
        else:
            groups.append([layer])
    found = []
    for group in groups:
        count = -(-len(group) // LONGEST_STRETCH)
        cuts = [len(group) * cut // count for cut in range(count + 1)]
        parts = [group[at:to] for at, to in pairwise(cuts) if to - at > 1]
        found += [Stretch(part[0], part[-1], False) for part in parts]
        found += [Stretch(layer, layer + 1, True) for part in parts for layer in part[:-1]]
    return tuple(found)
