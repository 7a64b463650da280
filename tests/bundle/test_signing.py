"""Signatures: what was signed runs, nothing else does where a key is asked for."""

import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from dash_export import DashRuntime
from dash_export.building import build
from dash_export.bundle.bundle import Bundle
from dash_export.bundle.layout import SIGNATURE
from dash_export.bundle.signing import TRUSTED_KEY, check_signed
from dash_export.errors import BundleError, OutputError
from dash_export.files.outputs import locked
from tests.commands.helpers import done, refused

PEM, PLAIN = serialization.Encoding.PEM, serialization.NoEncryption()


def keys(folder: Path, name: str) -> tuple[Path, Path]:
    """(private, public) key files."""
    key = ec.generate_private_key(ec.SECP256R1())
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    private.write_bytes(key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, PLAIN))
    public.write_bytes(key.public_key().public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture
def signed(own_bundle: Path, tmp_path: Path) -> tuple[Path, Path]:
    """The keys by which `own_bundle` is signed."""
    private, public = keys(tmp_path, "mine")
    done("sign", own_bundle, "--key", private)
    return private, public


def test_only_what_was_signed_runs(own_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (mine, public), (_, others) = keys(tmp_path, "mine"), keys(tmp_path, "others")
    run = ("run", own_bundle, "--raw", "x", "--max-tokens", 1, "--target", "cpu-fp32")
    assert "is not signed" in refused(*run, "--trusted-key", public)
    done("sign", own_bundle, "--key", mine)
    done(*run, "--trusted-key", public)
    assert "is not as" in refused(*run, "--trusted-key", others)
    monkeypatch.setenv(TRUSTED_KEY, str(public))
    DashRuntime.load(own_bundle, "portable")
    done("eval", own_bundle, "--limit", 1, "--kinds", "dense", "--target", "cpu-fp32")  # that key is for all
    build(own_bundle, "cpu", weights="int8")
    assert not (own_bundle / "manifest.json.sig").exists(), "it was of another manifest"
    assert "is not signed" in refused(*run)
    copy = Path(shutil.copytree(own_bundle, tmp_path / "copy.dash", ignore=shutil.ignore_patterns("onnx")))
    assert "is not signed" in refused("build", copy, "--weights", "fp32", "--measure"), "it runs them"
    done("sign", own_bundle, "--key", mine)
    done(*run)
    monkeypatch.setenv(TRUSTED_KEY, str(tmp_path / "none"))
    assert "no key at" in refused(*run)
    assert not list(own_bundle.glob("*.unfinished"))


def test_a_build_that_changes_nothing_keeps_the_signature(own_bundle: Path, signed: tuple[Path, Path]) -> None:
    (private, public), bundle = signed, Bundle.open(own_bundle)
    bundle.save_build(bundle.load_build("cpu-fp32"))
    DashRuntime.load(own_bundle, "cpu-fp32", trusted_key=public)
    (own_bundle / "engines/cpu-fp32/more.onnx").write_bytes(b"")
    assert "put there afterwards" in refused("sign", own_bundle, "--key", private), "no run would take it"


def test_a_signature_is_not_of_an_earlier_build(own_bundle: Path, tmp_path: Path) -> None:
    (private, public), bundle = keys(tmp_path, "mine"), Bundle.open(own_bundle)
    record = own_bundle / "engines/cpu-fp32/build.json"
    earlier, known = record.read_bytes(), bundle.load_build("cpu-fp32")
    bundle.save_build(replace(known, seconds=known.seconds + 1))
    done("sign", own_bundle, "--key", private)
    DashRuntime.load(own_bundle, "cpu-fp32", trusted_key=public)
    record.write_bytes(earlier)
    with pytest.raises(BundleError, match=r"build\.json is not the file that was written"):
        DashRuntime.load(own_bundle, "cpu-fp32", trusted_key=public)


def test_another_manifest_than_was_read_is_refused(own_bundle: Path, tmp_path: Path) -> None:
    private, public = keys(tmp_path, "mine")
    read = Bundle.open(own_bundle)
    build(own_bundle, "cpu", weights="int8")
    done("sign", own_bundle, "--key", private)
    with pytest.raises(BundleError, match="replaced while it was read"):
        check_signed(read, public)


def test_keys_and_bundles_that_cannot_be_signed(own_bundle: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "rsa.pem"
    key = rsa.generate_private_key(65537, 2048)
    for content in (b"no key", key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, PLAIN)):
        wrong.write_bytes(content)
        assert "no private key that can sign" in refused("sign", own_bundle, "--key", wrong)
    os.mkfifo(tmp_path / "fifo.pem")
    assert "no private key that can sign" in refused("sign", own_bundle, "--key", tmp_path / "fifo.pem")
    private, _ = keys(tmp_path, "mine")
    (own_bundle / "manifest.json.sig.unfinished").symlink_to(wrong)
    before = wrong.read_bytes()
    done("sign", own_bundle, "--key", private)
    assert wrong.read_bytes() == before
    (own_bundle / "manifest.json.sig").unlink()
    (own_bundle / "manifest.json.sig").symlink_to(wrong)
    for weights in ("fp32", "int8"):  # before anything is measured or made
        with pytest.raises(OutputError, match="no signature but a link"):
            build(own_bundle, "cpu", weights=weights, measure=True)
    assert not list(own_bundle.glob("engines/cpu-int8/*.onnx"))
    refused("sign", own_bundle, "--key", private)
    assert (own_bundle / "manifest.json.sig").is_symlink()
    (own_bundle / "manifest.json.sig").unlink()
    next(own_bundle.glob("engines/cpu-fp32/layer*.onnx")).write_bytes(b"")
    assert "hash mismatch" in refused("sign", own_bundle, "--key", private)
    assert not (own_bundle / "manifest.json.sig").exists()


def test_what_a_key_asks_for(own_bundle: Path, signed: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = next(own_bundle.glob("engines/cpu-fp32/layers*.onnx"))
    engine.write_bytes(bytes(engine.stat().st_size))
    with pytest.raises(BundleError, match="hash mismatch"):
        DashRuntime.load(own_bundle, "cpu-fp32", trusted_key=signed[1], verify=False)
    monkeypatch.setenv(TRUSTED_KEY, str(signed[1]))
    with pytest.raises(BundleError, match="no key at"):
        DashRuntime.load(own_bundle, "portable", trusted_key="")


def test_two_at_once(own_bundle: Path, tmp_path: Path) -> None:
    private, _ = keys(tmp_path, "mine")
    with locked(own_bundle / SIGNATURE, "sign"):
        assert "manifest.json.sig is being written by dash-export sign" in refused("sign", own_bundle, "--key", private)


def test_a_signature_of_gigabytes(own_bundle: Path, signed: tuple[Path, Path]) -> None:
    os.truncate(own_bundle / "manifest.json.sig", 3 << 30)
    began = time.monotonic()
    with pytest.raises(BundleError, match="at most 1048576 are read"):
        DashRuntime.load(own_bundle, "portable", trusted_key=signed[1])
    assert time.monotonic() - began < 5
