"""Bundles on a hub: published, fetched, refused."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import constants

from dash_export import DashRuntime, hub
from dash_export.bundle import Bundle
from dash_export.errors import BundleError
from dash_export.targets import load_recipe
from tests.commands.helpers import dash, refused
from tests.fake_hub import FakeHub, fake_hub

NAME, TARGET = "me/tiny", "cpu-fp32"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with fake_hub() as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.address)
        template = f"{found.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
        monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.chdir(tmp_path)
        yield found


def publish(bundle: Path) -> None:
    hub.push(Bundle.open(bundle), NAME, private=False, base_model=None, license_id=None)


def answer(bundle: str | Path, target: str = TARGET) -> tuple[int, ...]:
    return tuple(DashRuntime.load(bundle, target).generate([5, 6, 7], max_tokens=4).tokens)


def test_published_and_run(server: FakeHub, own_bundle: Path) -> None:
    told = dash("push", own_bundle, NAME, "--base-model", "org/base", "--license", "apache-2.0")
    assert told.exit_code == 0, told.output
    card = server.files[NAME]["README.md"].decode()
    point = Bundle.open(own_bundle).load_build(TARGET).dial[1]
    for said in ("library_name: dash-export", "base_model: org/base", "license: apache-2.0", f"| {point.time:.3f} |"):
        assert said in card
    assert answer(NAME) == answer(own_bundle)
    assert server.fetched
    assert not [name for name in server.fetched if name.startswith("onnx/")], "a run needs no portable graphs"
    before = len(server.fetched)
    assert dash("run", NAME, "--target", TARGET, "--raw", "x", "--max-tokens", 2).exit_code == 0
    assert len(server.fetched) == before, "nothing is fetched twice"
    assert answer(NAME, "portable") == answer(own_bundle, "portable")


def test_a_later_version_takes_the_place_of_the_earlier(server: FakeHub, own_bundle: Path) -> None:
    publish(own_bundle)
    server.files[NAME]["README.md"] = b"my own words"
    (own_bundle / f"engines/{TARGET}/more.onnx").write_bytes(b"")
    with pytest.raises(BundleError, match="put there afterwards"):
        publish(own_bundle)
    shutil.rmtree(own_bundle / f"engines/{TARGET}")
    publish(own_bundle)
    assert not [name for name in server.files[NAME] if name.startswith(f"engines/{TARGET}")]
    assert server.files[NAME]["README.md"] == b"my own words"
    assert answer(NAME, "portable")


@pytest.mark.usefixtures("server")
def test_what_is_gone_from_the_hub_goes_from_the_cache(own_bundle: Path) -> None:
    publish(own_bundle)
    old = hub.fetch(NAME, TARGET, trusted=False) / f"engines/{TARGET}/old.onnx"
    old.write_bytes(b"of the version before")
    assert answer(NAME)
    assert not old.exists()


@pytest.mark.usefixtures("server")
def test_without_the_hub_the_last_version_runs(own_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(own_bundle)
    found = answer(NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert answer(NAME) == found
    assert "connect" in refused("run", "me/other", "x")


def test_refused(server: FakeHub, own_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.files["me/model"] = {"config.json": b"{}", "model.safetensors": b""}
    assert "something else than a bundle" in refused("push", own_bundle, "me/model")
    assert "is no bundle" in refused("run", "me/model", "x")
    assert set(server.files["me/model"]) == {"config.json", "model.safetensors"}
    assert "check the spelling" in refused("run", "me/nothing", "x")
    for name in ("tiny", "me/tiny.dash", "a/b/c"):
        assert "expected org/name" in refused("push", own_bundle, name)
    assert "was not published" in refused("push", own_bundle, "me/..")
    publish(own_bundle)
    monkeypatch.delenv("HF_TOKEN")
    assert "hf auth login" in refused("push", own_bundle, "me/new")
    engine = next(name for name in server.files[NAME] if name.startswith(f"engines/{TARGET}/layers"))
    server.files[NAME][engine] += b" "
    assert "hash mismatch" in refused("run", NAME, "x", "--target", TARGET)
    (own_bundle / engine).write_bytes(b"damaged")
    assert "hash mismatch" in refused("push", own_bundle, NAME)


def test_engines_of_a_gpu_are_fetched_only_with_a_key(
    server: FakeHub, own_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(own_bundle)
    load_build, recipe = Bundle.load_build, load_recipe("h100")
    monkeypatch.setattr(Bundle, "load_build", lambda self, target: replace(load_build(self, target), recipe=recipe))
    with pytest.raises(BundleError, match="engines of a GPU are code"):
        hub.fetch(NAME, TARGET, trusted=False)
    assert not [name for name in server.fetched if name.endswith(".onnx")]
    hub.fetch(NAME, TARGET, trusted=True)


@pytest.mark.parametrize(
    ("name", "found"), [("org/name", True), ("org/name.dash", False), ("/a/b", False), ("a", False), ("tests/x", False)]
)
def test_names_of_the_hub(name: str, found: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tests").mkdir()
    assert hub.is_hub_id(name) == found
