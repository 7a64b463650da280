"""Bundles on a hub: published, fetched, refused."""

import gc
import os
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from huggingface_hub import HfApi, constants

from dash_export import DashRuntime
from dash_export.bundle import hub, signing
from dash_export.bundle.bundle import Bundle
from dash_export.bundle.layout import is_hub_id
from dash_export.bundle.recipe import load_recipe
from dash_export.commands import tables
from dash_export.errors import BundleError
from tests.commands.helpers import dash, done, refused
from tests.fake_hub import FakeHub, fake_hub
from tests.tiny import tiny_bundle

NAME, TARGET = "me/tiny", "cpu-fp32"


@pytest.fixture(scope="module", autouse=True)
def little_to_collect(tiny_root: Path) -> None:  # noqa: ARG001
    """What earlier tests hold is not looked through by each `gc.collect` here."""
    gc.freeze()


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


@pytest.fixture(scope="module")
def publish_another(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., None]:
    """`publish_another(bundle, size=80)`: in the place of `bundle`, and as a later version of it."""

    @lru_cache
    def made(size: int) -> Path:
        return tiny_bundle(tmp_path_factory.mktemp("other"), "cpu", intermediate_size=size)

    def publish_another(bundle: Path, size: int = 80) -> None:
        shutil.rmtree(bundle)
        publish(Path(shutil.copytree(made(size), bundle)))

    return publish_another


def answer(bundle: str | Path, target: str = TARGET) -> tuple[int, ...]:
    found = tuple(DashRuntime.load(bundle, target).generate([5, 6, 7], max_tokens=4).tokens)
    gc.collect()  # nobody runs it any more
    return found


def test_published_and_run(server: FakeHub, own_bundle: Path) -> None:
    done("push", own_bundle, NAME, "--base-model", "org/base", "--license", "apache-2.0")
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
    """What others put into a repository stays, and so does its card."""
    publish(own_bundle)
    mine = {"README.md": b"my own words", "onnx/notes.txt": b"mine", "engines/mine/plan": b"mine"}
    server.files[NAME] |= mine
    (own_bundle / f"engines/{TARGET}/more.onnx").write_bytes(b"")
    with pytest.raises(BundleError, match="put there afterwards"):
        publish(own_bundle)
    shutil.rmtree(own_bundle / f"engines/{TARGET}")
    publish(own_bundle)
    assert not [name for name in server.files[NAME] if name.startswith(f"engines/{TARGET}")]
    assert mine.items() <= server.files[NAME].items()
    assert answer(NAME, "portable")


def cache(server: FakeHub) -> Path:
    """The version that the hub has now."""
    return Path("cache/dash-export/hub").absolute() / NAME / server.sha(NAME)


def test_what_is_not_whole_takes_no_place(
    server: FakeHub,
    own_bundle: Path,
    publish_another: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A version that breaks off, is damaged or not signed: the one before runs, also when the hub cannot be reached."""
    publish(own_bundle)
    found, first = answer(NAME), cache(server)
    publish_another(own_bundle)
    whole = dict(server.files[NAME])
    engine = next(name for name in whole if name.startswith(f"engines/{TARGET}/layers") and name.endswith(".onnx"))
    for state in ("gone", "damaged", "not signed"):
        server.files[NAME] = dict(whole)
        if state == "gone":
            del server.files[NAME][engine]
        if state == "damaged":
            server.files[NAME][engine] += b" "
        if state == "not signed":
            faults = iter(("not signed", "not signed", ""))

            def check(*_: object, faults: Iterator[str] = faults, **__: object) -> None:
                if fault := next(faults):
                    raise BundleError(fault)

            monkeypatch.setattr(signing, "check_signed", check)  # a Mock would hold what it was called with
            monkeypatch.setenv(signing.TRUSTED_KEY, "key")
        caplog.clear()
        assert answer(NAME) == found, state
        assert "that was loaded last runs" in caplog.text
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(signing, "check_signed", lambda *_, **__: None)
        assert answer(NAME) == found
        assert "HF_HUB_OFFLINE" in refused("run", "me/other", "x")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv(signing.TRUSTED_KEY)
    server.files[NAME] = whole
    gc.collect()
    assert answer(NAME) == answer(own_bundle) != found
    assert not first.exists(), "nobody wants it any more"


def test_a_version_stays_while_it_runs(server: FakeHub, own_bundle: Path, publish_another: Callable[..., None]) -> None:
    """Engines for several rows are loaded when they are first needed."""
    publish(own_bundle)
    runtime, versions = DashRuntime.load(NAME, TARGET), [cache(server)]
    expected = DashRuntime.load(own_bundle, TARGET).generate_batch([[5, 6, 7], [8, 9]], 4)
    assert runtime.bundle.name == "tiny"
    for size in (80, 112):
        publish_another(own_bundle, size)
        answer(NAME)
        versions.append(cache(server))
    assert [path.exists() for path in versions] == [True, False, True]
    for found, alone in zip(runtime.generate_batch([[5, 6, 7], [8, 9]], 4), expected, strict=True):
        np.testing.assert_array_equal(found.tokens, alone.tokens)


def test_the_last_signed_version_stays_for_who_has_the_key(
    server: FakeHub, own_bundle: Path, publish_another: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(own_bundle)
    first = server.sha(NAME)

    def check(bundle: Bundle, public_key: str) -> None:
        assert str(public_key) == "key"
        if bundle.root.name != first:
            raise BundleError("not signed")

    monkeypatch.setattr(signing, "check_signed", check)
    DashRuntime.load(NAME, TARGET, trusted_key="key")
    publish_another(own_bundle)
    answer(NAME)
    assert DashRuntime.load(NAME, TARGET, trusted_key="key").bundle.root.name == first


def test_what_is_damaged_here_is_fetched_anew(server: FakeHub, own_bundle: Path) -> None:
    publish(own_bundle)
    found = answer(NAME)
    for name in ("manifest.json", next(cache(server).glob(f"engines/{TARGET}/layers*.onnx"))):
        path = cache(server) / name
        path.write_bytes(bytes(path.stat().st_size))
        assert answer(NAME) == found


def test_a_missing_target_costs_no_other(server: FakeHub, own_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(own_bundle)
    found, engine = answer(NAME), next(cache(server).glob(f"engines/{TARGET}/layers*.onnx"))
    for target in ("nothing", "../../x", "x" * 5000):
        with pytest.raises(BundleError):
            DashRuntime.load(NAME, target)
    assert engine.exists()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert answer(NAME) == found


def test_several_at_once(server: FakeHub, own_bundle: Path) -> None:
    publish(own_bundle)
    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(answer, [NAME] * 4))) == 1
    assert len(server.fetched) == len(set(server.fetched))


def test_refused(server: FakeHub, own_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = {"manifest.json": b'{"pwa": 1}', "onnx/model.onnx": b"mine", "config.json": b"{}"}
    others = {"me/model": {"config.json": b"{}", "model.safetensors": b""}, "me/app": app}
    server.files |= {name: dict(files) for name, files in others.items()}
    for name in others:
        assert "something else than a bundle" in refused("push", own_bundle, name)
        assert server.files[name] == others[name]
    assert "is no bundle" in refused("run", "me/model", "x")
    assert "check the spelling" in refused("run", "me/nothing", "x")
    for name in ("tiny", "me/tiny.dash", "a/b/c"):
        assert "expected org/name" in refused("push", own_bundle, name)
    assert "nor a valid hub id" in refused("push", own_bundle, "me/..")
    publish(own_bundle)
    monkeypatch.delenv("HF_TOKEN")
    assert "hf auth login" in refused("push", own_bundle, "me/new")
    engine = next(name for name in server.files[NAME] if name.startswith(f"engines/{TARGET}/layers"))
    server.files[NAME][engine] += b" "
    assert "hash mismatch" in refused("run", NAME, "x", "--target", TARGET), "and nothing was loaded before"
    (own_bundle / engine).write_bytes(b"damaged")
    assert "hash mismatch" in refused("push", own_bundle, NAME)


@pytest.mark.usefixtures("server")
def test_what_changes_while_it_is_published(own_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build that ends meanwhile replaces only its record."""
    record = own_bundle / f"engines/{TARGET}/build.json"
    upload = HfApi.upload_folder

    def and_change(*given: Any, **how: Any) -> Any:
        os.utime(record, (1, 1))
        return upload(*given, **how)

    monkeypatch.setattr(HfApi, "upload_folder", and_change)
    with pytest.raises(BundleError, match="was published, but of files that changed meanwhile"):
        publish(own_bundle)


def test_engines_of_a_gpu_are_fetched_only_with_a_key(
    server: FakeHub, own_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(own_bundle)
    load_build, recipe = Bundle.load_build, load_recipe("h100")
    monkeypatch.setattr(Bundle, "load_build", lambda self, target: replace(load_build(self, target), recipe=recipe))
    with pytest.raises(BundleError, match="engines of a GPU are code"):
        hub.load_from_hub(NAME, TARGET, None, Mock())
    assert not [name for name in server.fetched if name.endswith(".onnx")]
    trusted = Mock()
    assert hub.load_from_hub(NAME, TARGET, trusted, lambda bundle: bundle.root) == cache(server)
    trusted.assert_called_once()


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("org/name", True),
        *((name, False) for name in ("org/name.dash", "/a/b", "a", "tests/x", "../x", "x" * 5000 + "/a")),
    ],
)
def test_names_of_the_hub(name: str, found: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tests").mkdir()
    assert is_hub_id(name) == found


@pytest.mark.usefixtures("server")
def test_what_the_cache_holds_is_listed_and_removed(own_bundle: Path) -> None:
    """With the bytes that it takes; but not while a process runs it, and nothing beside the cache."""
    assert "Bundles of the hub in" in done("list").stdout
    assert ": none." in done("list").stdout
    publish(own_bundle)
    runtime = DashRuntime.load(NAME, TARGET)
    folder = Path("cache/dash-export/hub") / NAME
    taken = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    listed = done("list").stdout
    assert "smollm2-135m-instruct" in listed, "the policies that come with the package"
    assert re.search(rf"^ {NAME} +{re.escape(tables.size(taken))}", listed, re.MULTILINE), listed
    assert "me/tiny is in use" in refused("list", "--remove", NAME)
    assert runtime.generate([5, 6, 7], max_tokens=2).tokens.size == 2
    del runtime
    gc.collect()
    for name in ("me/other", "../..", "me"):
        assert f"{name} is not in the cache. What is there: {NAME}." in refused("list", "--remove", name)
    assert f"{tables.size(taken)} are free again" in done("list", "--remove", NAME).stdout
    assert not folder.exists()
    assert answer(NAME) == answer(own_bundle), "it is fetched again"
