"""`bench`: a table, then one line of JSON."""

import json
from pathlib import Path

import pytest

from tests.commands.helpers import done, refused

SMALL = ("--target", "cpu-fp32", "--prompt", 20, "--tokens", 8, "--rounds", 1)


def test_table_and_json(tiny_root: Path) -> None:
    """Rates are what the times say; every setting, and another build beside; and what the bundle cannot give."""
    begin = ("bench", tiny_root, *SMALL, "--kinds", "static", "--skipped", "1,99")
    lines = done(*begin, "--also", f"{tiny_root}:portable").stdout.splitlines()
    found = json.loads(lines[-1])
    lanes = [(lane["build"], lane["label"]) for lane in found["lanes"]]
    assert lanes == [("", "dense"), ("", "static, skipped 1"), ("tiny:portable", "tiny:portable")]
    assert [item["label"] for item in found["refused"]] == ["static, skipped 99"]
    for lane in found["lanes"]:
        assert lane["prompt_tokens_per_second"] == pytest.approx(20e3 / lane["prompt_ms"])
        assert lane["tokens_per_second"] == pytest.approx(1e3 / lane["milliseconds"])
        row = next(line.split() for line in lines if line.strip().startswith(f"{lane['label']} "))
        assert f"{lane['prompt_tokens_per_second']:.0f}" in row
        assert f"{lane['tokens_per_second']:.1f}" in row
    assert found["course"] == {"text": "prose.txt", "context": 20, "tokens": 8, "windows": 1, "rounds": 1}
    assert found["machine"]["packages"]["onnxruntime"]
    drafts = found["drafts"]
    assert drafts["tokens_per_pass"] >= 1
    assert any(line.startswith(f"With drafts {drafts['tokens_per_second']:.1f} tokens/s") for line in lines)


def test_refuses(tiny_root: Path) -> None:
    assert "at most 512 in all" in refused("bench", tiny_root, *SMALL[:2], "--prompt", 500)
    assert "none of the settings" in refused("bench", tiny_root, *SMALL, "--skipped", 50)
