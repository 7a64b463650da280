"""What the product imports and loads, with the functions of a card that is not there."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import cuda.bindings.runtime as rt

from tests.standin.memory import BrokenRuleError

if TYPE_CHECKING:
    from tests.standin.cuda import Card


class Runtime:
    """In the place of `cuda.bindings.runtime`: its types, and the card's functions."""

    def __init__(self, card: Card) -> None:
        self.on = card

    def __getattr__(self, name: str) -> Any:
        real, card = getattr(rt, name), self.on
        if isinstance(real, type | int):
            return real
        made = getattr(card, re.sub(r"_v\d$", "", name))

        def call(*given: Any) -> Any:
            with card.lock:
                card.calls[name] += 1
                if (plain := name.removesuffix("_v2")) in card.failing:
                    return card.failing[plain], None
                try:
                    return made(*given)
                except BrokenRuleError:
                    card.break_recordings()
                    raise

        return call


def driver(card: Card) -> Any:
    """In the place of `cuda.bindings.driver`."""
    return SimpleNamespace(
        cuModuleLoadData=card.load, cuModuleGetFunction=card.function, cuLaunchKernel=card.launch_kernel
    )


def libcuda(card: Card) -> Any:
    """In the place of `libcuda`, of which is asked what there is."""

    def put(where: Any, value: Any) -> int:
        where._obj.value = value
        return 0

    return SimpleNamespace(
        cuInit=lambda _: 0,
        cuDeviceGetCount=lambda found: put(found, 1),
        cuDriverGetVersion=lambda found: put(found, card.version),
        cuDeviceGet=lambda found, index: put(found, index),
        cuDeviceGetName=lambda name, _size, _device: setattr(name, "value", b"a card") or 0,
        cuDeviceTotalMem_v2=lambda found, _: put(found, card.total),
        cuDeviceGetAttribute=lambda found, which, _: put(found, {75: 12, 18: card.integrated}.get(which, 0)),
    )
