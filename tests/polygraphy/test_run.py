"""`polygraphy run --dash`, as a user calls it: engines against their portable graphs, whole steps, and the errors."""

import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.forged import edit

pytest.importorskip("polygraphy")
PLUGINS = importlib.metadata.entry_points(group="polygraphy.run.plugins")
pytestmark = pytest.mark.skipif(
    "dash-export" not in PLUGINS.names, reason="the plug-in is not registered: install the package (pip install -e .)"
)
MAIN = "import sys; from polygraphy.tools import main; sys.exit(main())"
CLOSE = ("--atol", "1e-4", "--rtol", "1e-3")
HALF = ("--atol", "2e-3", "--rtol", "1e-3")
"""For a bypass's K and V beside its layer's: a bundle keeps those of the bypass in 16 bits."""
SEQUENTIAL = "--sequential-runners"
"""Side by side they report no times."""
FP32 = ("--dash-target", "cpu-fp32")
Here = Callable[..., subprocess.CompletedProcess[str]]


def python(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *(str(part) for part in arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def polygraphy(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return python("-c", MAIN, "run", *arguments)


@pytest.fixture
def here(capsys: pytest.CaptureFixture[str]) -> Here:
    """`polygraphy` in this process, which takes a tenth of the time: for what ends before anything runs."""
    from polygraphy.tools import main

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        code = main(["run", *map(str, arguments)])
        return subprocess.CompletedProcess([], code, *capsys.readouterr())

    return run


def passed(result: subprocess.CompletedProcess[str]) -> bool:
    assert "Traceback" not in result.stdout + result.stderr, result.stdout + result.stderr
    assert ("PASSED | Runtime" in result.stdout) == (result.returncode == 0), result.stdout + result.stderr
    return result.returncode == 0


def error(result: subprocess.CompletedProcess[str]) -> str:
    assert not passed(result)
    (line,) = (line for line in (result.stdout + result.stderr).splitlines() if line.startswith("[!]"))
    return line


def test_a_prefill_by_the_graphs_path(tiny_root: Path) -> None:
    """The model names bundle and engine; the runners in the other order; more steps than positions are left."""
    steps = ("--dash-tokens", "7", "--dash-context", "30", "--iterations", "20")
    graph = tiny_root / "onnx" / "layer_04.onnx"
    result = polygraphy(graph, "--dash", *FP32, "--onnxrt", *steps, *CLOSE, SEQUENTIAL)
    assert passed(result), result.stdout
    assert "hidden [dtype=float32, shape=(1, 7, " in result.stdout
    times = re.findall(r"Completed 20 iteration\(s\) in ([\d.e+-]+) ms \| Average inference time", result.stdout)
    assert len(times) == 2
    assert all(0 < float(time) < 20_000 for time in times)


def point_to(bundle: Path, file: str) -> None:
    """The record says that layer_04 is another file."""
    record = bundle / "engines" / "cpu-fp32" / "build.json"
    edit(record, lambda data: data["engines"]["layer_04"].update(file=f"engines/cpu-fp32/{file}"))


@pytest.mark.usefixtures("shared_pool")
def test_engines_that_are_not_their_graphs_fail(own_bundle: Path, here: Here) -> None:
    run = (own_bundle, "--dash", *FP32, "--dash-segment", "layer_04")
    point_to(own_bundle, "layers_02-03.onnx")
    assert "wants past_key_2" in error(here(*run))
    point_to(own_bundle, "bypass_04-04.onnx")
    result = polygraphy(*run, "--onnxrt", *HALF)
    assert not passed(result)
    assert "Mismatched outputs: ['hidden_out']" in result.stdout, "K and V are right, the update is another"
    point_to(own_bundle, "layer_04.onnx")
    weights = own_bundle / "engines" / "cpu-fp32" / "layer_04.data"
    weights.write_bytes(bytes(reversed(weights.read_bytes())))
    assert "layer_04.data is not the file that was written" in error(here(*run))


def test_whole_steps_of_two_builds_and_two_settings(tiny_root: Path, tmp_path: Path, here: Here) -> None:
    kept = tmp_path / "dense.json"
    steps = ("--dash-tokens", "2", "--iterations", "3")
    dense = here(tiny_root, "--dash", *FP32, *steps, "--save-outputs", kept, SEQUENTIAL)
    assert passed(dense), dense.stdout
    assert "{input_ids [dtype=int64, shape=(1, 66)]}" in dense.stdout
    assert "{logits [dtype=float32, shape=(1, 2, 300)]}" in dense.stdout
    (time,) = re.findall(r"in [\d.e+-]+ ms \| Average inference time: ([\d.e+-]+)", dense.stdout)
    assert 0 < float(time) < 2000
    loaded = ("--dash", *steps, "--load-outputs", kept, *CLOSE)
    same = here(tiny_root, *loaded, "--dash-target", "portable")
    assert passed(same), same.stdout
    assert not passed(here(tiny_root, *loaded, *FP32, "--dash-skip", "4"))


def test_a_generated_script_runs(tiny_root: Path, tmp_path: Path, here: Here) -> None:
    """Of a merged segment, whose graph is in no bundle."""
    script = tmp_path / "script.py"
    run = (tiny_root, "--dash", "--onnxrt", *FP32, "--dash-segment", "layers_02-03", *CLOSE)
    assert here(*run, "--gen-script", script).returncode == 0
    result = python(script)
    assert result.returncode == 0, result.stdout + result.stderr
    (names,) = set(re.findall(r"All outputs matched \| Outputs: \[(.*)\]", result.stdout))
    caches = {f"present.{layer}.{kind}" for layer in (2, 3) for kind in ("key", "value")}
    assert set(re.findall(r"'([^']+)'", names)) == {"hidden_out", *caches}
    (graph,) = re.findall(r"'(/[^']*layers_02-03\.onnx)'", script.read_text())
    for file in Path(graph).parent.iterdir():
        file.unlink()
    Path(graph).parent.rmdir()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "several builds and none is 'cpu': give the target (--target), one of cpu-fp32, portable"),
        ([*FP32, "--dash-segment", "layer_77"], "no engine 'layer_77' that has a portable graph. Engines: bypass_"),
        ([*FP32, "--dash-segment", "layer_01"], "layer_01 is part of the segment layers_00-01."),
        ([*FP32, "--onnxrt"], "name an engine with --dash-segment"),
        ([*FP32, "--dash-segment", "layer_04", "--dash-max-kl", "0.1"], "--dash-max-kl is for whole steps"),
        ([*FP32, "--dash-skip", "0"], "Layers 0 are not whole units"),
        ([*FP32, "--dash-segment", "layer_04", "--dash-tokens", "0"], "at least 1"),
    ],
)
def test_mistakes_are_told_in_a_line(arguments: list[str], message: str, tiny_root: Path, here: Here) -> None:
    assert message in error(here(tiny_root, "--dash", *arguments))


def test_mistakes_without_a_bundle(
    tiny_root: Path, tmp_path: Path, here: Here, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "is a folder that is no bundle" in error(here(tmp_path, "--dash"))
    assert "--dash needs a bundle" in error(here("--dash"))
    with pytest.raises(SystemExit, match="2"):
        here(tiny_root, "--dash", "--dash-skip", "three")
    assert "'three' is not a list of layers" in capsys.readouterr().err
