"""Signatures of bundles by OpenSSF's model-signing. The signed file is `manifest.json`: it holds all other hashes."""

import os
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dash_export.bundle.bundle import LARGEST_RECORD, Bundle
from dash_export.bundle.layout import MANIFEST, SIGNATURE
from dash_export.errors import BundleError, StaleBuildError
from dash_export.files.artifacts import read_bounded, write_atomic
from dash_export.files.outputs import check_writable, folder_locked, lock_file, locked

TRUSTED_KEY = "DASH_EXPORT_TRUSTED_KEY"
"""Environment variable: the public key that every bundle has to be signed by before it is run."""
_LARGEST = 1 << 20
"""Bound in bytes of a signature and of a key."""


def sign(bundle: Bundle, private_key: Path) -> Path:
    """Write the signature of a bundle and its builds, as they are now, and return its file. `private_key`: of an
    elliptic curve, in PEM, without a password. Raises BundleError for any other key, and for a damaged bundle;
    OutputError where a link lies in the signature's place.
    """
    signing, place = _library("signing"), bundle.path(SIGNATURE)
    check_writable(bundle.root)
    with folder_locked(bundle.root, [lock_file(bundle.root)], shared=True), TemporaryDirectory() as folder:
        bundle = Bundle.open(bundle.root)  # read again, now that no export can replace it
        bundle.check_listed(None)
        for target in bundle.targets():
            with suppress(StaleBuildError):  # a stale build never runs
                build = bundle.load_build(target)
                bundle.check_listed(build)
                bundle.verify(build.files)
        bundle.verify(record for record in bundle.manifest.files if bundle.path(record.name).exists())
        signed = Path(folder) / MANIFEST
        signed.write_bytes(read_bounded(bundle.path(MANIFEST), LARGEST_RECORD))
        try:
            read_bounded(private_key, _LARGEST)  # refuse a pipe, which would block; make no copy of the key
            config = signing.Config().use_elliptic_key_signer(private_key=private_key)
            config.sign(signed, Path(folder) / SIGNATURE)
        except Exception as error:
            advice = "Expected an elliptic curve's: openssl ecparam -name prime256v1 -genkey -noout -out key.pem"
            raise BundleError(f"{private_key} is no private key that can sign ({error}). {advice}") from None
        with locked(place, "sign"):  # another `sign` would take the same temporary name
            write_atomic(place, (Path(folder) / SIGNATURE).read_bytes())
        if read_bounded(bundle.path(MANIFEST), LARGEST_RECORD) != signed.read_bytes():
            place.unlink(missing_ok=True)  # the build may have removed it
            raise BundleError(f"{bundle.root} was built while it was signed: sign it again.")
    return place


def trusted_key(given: str | Path | None) -> Path | None:
    """Return the public key that must have signed a bundle: the one given, else the environment's, else None."""
    found = os.environ.get(TRUSTED_KEY) or None if given is None else given
    return None if found is None else Path(found)


def check_trusted(bundle: Bundle) -> None:
    """Call `check_signed` with the environment's key, where there is one."""
    if (key := trusted_key(None)) is not None:
        check_signed(bundle, key)


def check_signed(bundle: Bundle, public_key: Path) -> None:
    """Raise BundleError unless the owner of `public_key` signed the manifest that was read."""
    verifying, seen = _library("verifying"), bundle.path(MANIFEST)
    with TemporaryDirectory() as folder:
        manifest, signature, key = (Path(folder) / name for name in (MANIFEST, SIGNATURE, "key"))
        manifest.write_bytes(read_bounded(seen, LARGEST_RECORD))
        for copy, source, fault in (
            (key, public_key, f"There is no key at {public_key}: --trusted-key or {TRUSTED_KEY} asks for it"),
            (signature, bundle.path(SIGNATURE), f"{bundle.root} is not signed, and {public_key} is to have signed it"),
        ):
            try:
                copy.write_bytes(read_bounded(source, _LARGEST))
            except OSError as error:
                raise BundleError(f"{fault} ({error.strerror}). {_SIGN}") from error
        try:
            verifying.Config().use_elliptic_key_verifier(public_key=key).verify(manifest, signature)
        except Exception as error:
            reason = "its manifest changed since (a build does that), or another key signed it"
            raise BundleError(f"{bundle.root} is not as {public_key} signed it: {reason}. {_SIGN}") from error
        # The signature must be of the manifest that was read before, not only of the one on disk now.
        if Bundle.open(bundle.root).manifest != bundle.manifest or seen.read_bytes() != manifest.read_bytes():
            raise BundleError(f"{bundle.root}: {MANIFEST} was replaced while it was read. Load it again.")


_SIGN = "Its owner runs: dash-export sign BUNDLE --key KEY"


def _library(module: str) -> Any:
    try:
        return import_module(f"model_signing.{module}")
    except ImportError as error:
        raise BundleError("Signatures need model-signing: pip install 'dash-export[sign]'") from error
