"""Runs the PTX of a kernel, thread by thread: the kernel's own instructions, not another telling.
What no kernel uses is not here and raises KeyError.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np

FORMATS = {"f32": "f", "f64": "d", "u8": "B", "b8": "B", "u16": "H", "u32": "I", "u64": "Q", "s32": "i", "s64": "q"}
COMPARE = {"lt": "{} < {}", "gt": "{} > {}", "ge": "{} >= {}", "le": "{} <= {}", "eq": "{} == {}"}
COMPARE |= {"leu": "not {} > {}", "geu": "not {} < {}", "ltu": "not {} >= {}", "ne": "{} != {}"}  # or one is no number
ARITHMETIC = dict.fromkeys(("mov", "cvta", "cvt"), "{}") | {
    "add": "{} + {}",
    "and": "{} & {}",
    "mul": "{} * {}",
    "div": "{} // {}",  # of numbers without a sign
    "mad": "{} * {} + {}",
    "sub": "{} - {}",
    "or": "{} | {}",
    "max": "max({}, {})",
    "not": "~{}",
    "bfi": "{1} | {0} << {2}",  # into bits that are zero
    "shl": "{} << {}",
    "shr": "{} >> {}",
    "selp": "{0} if {2} else {1}",
    "ex2": "2.0 ** {}",
}
View = Callable[[int, int], "np.ndarray[Any, np.dtype[np.uint8]]"]
"""(address, bytes) -> device memory."""


@cache
def kernels(text: str) -> dict[str, Kernel]:
    """Every kernel of a PTX file by name."""
    found = re.findall(r"\.visible \.entry (\w+)\((.*?)\)\s*\{(.*?)\n\}", text, re.DOTALL)
    return {name: Kernel(re.findall(r"\w+_param_\d+", parameters), body) for name, parameters, body in found}


class Kernel:
    """One kernel, translated to Python line by line: what it does in one thread."""

    def __init__(self, parameters: list[str], body: str) -> None:
        lines = [" ".join(line.split()) for line in re.sub(r"//.*", " ", body.replace(":", ":;")).split(";")]
        steps = [line.strip("{} ") for line in lines]
        steps = [step for step in steps if step and not step.startswith(".")]
        labels = {step[:-1]: str(index) for index, step in enumerate(steps) if step.endswith(":")}
        names = [*parameters, "tid_x", "ntid_x", "nctaid_x", "nctaid_z", "ctaid_x", "ctaid_y", "ctaid_z"]
        source = [f"def thread({', '.join(names)}, load, store, call):", " at = -1"]
        source += [" while True:", "  if at == -1:"]
        for index, step in enumerate(steps):
            if step.endswith(":"):
                source += [f"   at = {index}", f"  if at == {index}:"]
            else:
                source.append("   " + _python(step, labels))
        found: dict[str, Any] = {"pack": struct.pack, "unpack": struct.unpack}
        exec("\n".join(source), found)
        self._thread = found["thread"]

    def run(
        self,
        memory: View,
        blocks: tuple[int, int, int],
        threads: int,
        arguments: Sequence[int],
        call: Callable[[int, int], None],
    ) -> None:
        """All threads, one after another. `call`: the only function that may be called, with its two arguments."""

        def load(form: str, address: int) -> Any:
            return struct.unpack(form, memory(address, struct.calcsize(form)))[0]

        def store(form: str, address: int, value: Any) -> None:
            struct.pack_into(form, memory(address, struct.calcsize(form)), 0, value)

        for block in np.ndindex(blocks):
            for thread in range(threads):
                self._thread(*arguments, thread, threads, blocks[0], blocks[2], *block, load, store, call)


def _python(step: str, labels: dict[str, str]) -> str:
    """One instruction."""
    guard, step = re.fullmatch(r"(?:@(\S+) )?(.*)", step).groups()  # type: ignore[union-attr]
    name, _, rest = step.partition(" ")
    name, *kinds = name.split(".")
    operands = [
        re.sub(r"[%.]", "", re.sub(r"(tid|ctaid|ntid|nctaid)\.", r"\1_", part)) for part in re.split(r"[\s,()]+", rest)
    ]
    if name == "bra":
        step = f"at = {labels[rest]}; continue"
    elif name == "ret":
        step = "return"
    elif name == "call":
        step = f"call({operands[1]}, {operands[2]})"
    elif kinds[0] == "param":
        step = f"{operands[0]} = {operands[1]}".replace("[", "").replace("]", "").replace("+0", "")
    elif name == "ld":
        step = f"{operands[0]} = load({FORMATS[kinds[1]]!r}, {operands[1][1:-1]})"
    elif name == "st":
        step = f"store({FORMATS[kinds[1]]!r}, {operands[0][1:-1]}, {_read(operands[1], kinds[1])})"
    elif name == "atom":
        form, address = FORMATS[kinds[2]], operands[1][1:-1]
        step = f"{operands[0]} = load({form!r}, {address}); "
        step += f"store({form!r}, {address}, {ARITHMETIC[kinds[1]].format(operands[0], _read(operands[2], kinds[2]))})"
    else:
        form = COMPARE[kinds[0]] if name == "setp" else ARITHMETIC[name]
        found = form.format(*(_read(operand, kinds[-1]) for operand in operands[1:]))
        if name == "cvt" and kinds[0] == "rzi":
            found = f"int({found})"
        if name != "setp" and "wide" not in kinds:
            found = _read(found, kinds[-2] if name == "cvt" else kinds[-1])
        step = f"{operands[0]} = {found}"
    return f"if {guard[1:]}: {step}" if guard else step


def _read(value: str, kind: str) -> str:
    """A value as an instruction of that kind reads and writes it: a number of so many bits, with a sign or none; the
    bits of a float where it takes bits.
    """
    if literal := re.fullmatch("0([fd])([0-9A-F]{8,16})", value):
        return str(struct.unpack(f"!{literal[1]}", bytes.fromhex(literal[2]))[0])
    if kind[0] == "f" or kind == "pred" or re.fullmatch(r"p\d+", value):
        return value
    bits = int(kind[1:])
    if re.fullmatch(r"f\d+", value):
        return f"unpack('I', pack('f', {value}))[0]"
    half = 1 << (bits - 1) if kind[0] == "s" else 0
    return f"((({value}) + {half}) % {1 << bits} - {half})"
