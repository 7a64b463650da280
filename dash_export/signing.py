"""Signatures of bundles, by OpenSSF's model-signing: of `manifest.json`, which holds the hashes of all else."""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import Any

from dash_export.artifacts import identity
from dash_export.bundle import Bundle
from dash_export.errors import BundleError
from dash_export.names import MANIFEST, SIGNATURE
from dash_export.outputs import folder_locked, refuse_link

TRUSTED_KEY = "DASH_EXPORT_TRUSTED_KEY"
"""Environment variable: the public key that every loaded bundle has to be signed by."""


def sign(bundle: Bundle, private_key: Path) -> Path:
    """Write the signature of a bundle and its builds, as they are now, and return its file.

    `private_key`: PEM, an elliptic curve's, without a password. Raises BundleError for another, and for a damaged
    bundle; OutputError where something else lies in the signature's place.
    """
    signing = _library("signing")
    place = bundle.path(SIGNATURE)
    refuse_link(place)
    with folder_locked(bundle.root / "engines", [], shared=False, wait=True):  # no build ends meanwhile
        for target in bundle.targets():
            bundle.verify(bundle.load_build(target).files)
        bundle.verify(record for record in bundle.manifest.files if bundle.path(record.name).exists())
        unfinished = place.with_name(f"{SIGNATURE}.unfinished")
        try:
            signing.Config().use_elliptic_key_signer(private_key=private_key).sign(bundle.root / MANIFEST, unfinished)
            unfinished.replace(place)
        except OSError:
            raise
        except Exception as error:
            advice = "Expected an elliptic curve's: openssl ecparam -name prime256v1 -genkey -noout -out key.pem"
            raise BundleError(f"{private_key} is no private key that can sign ({error}). {advice}") from None
        finally:
            unfinished.unlink(missing_ok=True)
    return place


def trusted_key(given: str | Path | None) -> Path | None:
    """The public key that bundles have to be signed by: the one given, else the environment's."""
    found = given if given is not None else os.environ.get(TRUSTED_KEY)
    return Path(found) if found else None


def check_signed(bundle: Bundle, public_key: Path) -> None:
    """Raises BundleError where the manifest that was read is not the one that the owner of `public_key` signed."""
    verifying, manifest, signature = _library("verifying"), bundle.path(MANIFEST), bundle.path(SIGNATURE)
    if not public_key.is_file():
        raise BundleError(f"There is no key at {public_key}: it is asked for by --trusted-key or {TRUSTED_KEY}.")
    if not signature.is_file():
        raise BundleError(f"{bundle.root} is not signed, and {public_key} is to have signed it. {_SIGN}")
    seen = identity(manifest)
    try:
        verifying.Config().use_elliptic_key_verifier(public_key=public_key).verify(manifest, signature)
    except Exception as error:
        reason = "its manifest changed since (a build does that), or another key signed it"
        raise BundleError(f"{bundle.root} is not as {public_key} signed it: {reason}. {_SIGN}") from error
    if Bundle.open(bundle.root).manifest != bundle.manifest or identity(manifest) != seen:
        raise BundleError(f"{bundle.root}: {MANIFEST} was replaced while it was read. Load it again.")


_SIGN = "Its owner runs: dash-export sign BUNDLE --key KEY"


def _library(module: str) -> Any:
    try:
        return import_module(f"model_signing.{module}")
    except ImportError as error:
        raise BundleError("Signatures need model-signing: pip install 'dash-export[sign]'") from error
