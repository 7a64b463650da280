"""`list`: what comes with the package. The bundles in the cache: tests/bundle/test_hub.py."""

from dash_export.bundle.recipe import recipe_names
from dash_export.core.advice import shipped_policies
from tests.commands.helpers import done


def test_targets_and_policies() -> None:
    listed = done("list").stdout
    rows = {line.split()[0]: line for line in listed.splitlines() if line.strip()}
    assert {*recipe_names(), *shipped_policies()} <= rows.keys()
    assert rows["cpu"].split()[1:3] == ["onnxruntime", "int4"]
    assert "SmolLM2-135M-Instruct.Q4_1.gguf" in rows["smollm2-135m-instruct"]
    assert rows["smollm2-135m-instruct"].split()[-1] in ("yes", "no")
    assert "drafter" in rows["name"]
