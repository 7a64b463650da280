"""What the product asks of compiled bindings, and whether these have it."""

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def used(module: Any, known: Mapping[str, Any]) -> set[tuple[str, str]]:
    """(variable, chain of attributes) of everything a module asks of the bindings. `known`: variable or attribute ->
    what it holds.
    """
    found = set()
    for node in ast.walk(ast.parse(Path(module.__file__).read_text())):
        chain, inner = list[str](), node
        while isinstance(inner, ast.Attribute):
            chain.insert(0, inner.attr)
            inner = inner.value
        chain = [inner.id, *chain] if isinstance(inner, ast.Name) else []
        at = next((index for index, name in enumerate(chain[:-1]) if name in known), None)
        if at is not None and chain[0] not in ("toolkit", "cuda_graph", "kernels"):
            found.add((chain[at], ".".join(chain[at + 1 :])))
    return found


def check_names(asked: set[tuple[str, str]], known: Mapping[str, Any]) -> None:
    """Every name is in the installed bindings, and of every variable something is asked."""
    for variable, chain in asked:
        held = known[variable]
        for name in chain.split("."):
            assert hasattr(held, name), f"{variable}.{chain}"
            held = getattr(held, name)
    assert {variable for variable, _ in asked} == set(known)
