"""What lies there after an attack: whole, old, new, unfinished, or a fault."""

from __future__ import annotations

import hashlib
import json
import traceback
from collections import defaultdict
from pathlib import Path
from typing import Any

from shared import BUNDLE, PICTURE, POLICY, SEEDS, TARGETS, Fault, Stage

STRAYS = {
    ".lock": "a lock",
    ".tmp-": "a temporary name",
    ".unfinished": "an unfinished folder",
    "": "a file that no record lists",
}
"""What is in a name that is left behind -> what it is of; the first counts."""


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def bundle_state(stage: Stage, folder: Path) -> str | Fault:
    """The name of the policy of a whole bundle, `unfinished` where the bundle says so, or a fault."""
    from dash_export.bundle.bundle import Bundle
    from dash_export.errors import BundleError

    try:
        bundle = Bundle.open(folder / BUNDLE)
        bundle.verify(bundle.manifest.files)
    except BundleError as error:
        if "no bundle" in str(error) or "not a finished bundle" in str(error):
            return "unfinished"
        return Fault("a bundle that is damaged", str(error))
    except Exception:
        return Fault("traceback where a bundle is opened", traceback.format_exc())
    for name in SEEDS:
        if Bundle.open(stage.bundle(name)).manifest.files == bundle.manifest.files:
            return name
    return Fault("a bundle of no policy that was exported", bundle.manifest.policy.origin)


def build_state(stage: Stage, folder: Path, weights: str) -> str | Fault:
    """`whole` where a target's engines give the tokens they should, `stale`, `unfinished`, or a fault."""
    from dash_export import DashRuntime
    from dash_export.bundle.bundle import Bundle
    from dash_export.errors import DashError, StaleBuildError

    target = TARGETS[weights]
    try:
        runtime = DashRuntime.load(folder / BUNDLE, target)
    except StaleBuildError:
        return "stale"
    except DashError as error:
        if "is unfinished" in str(error) or "does not exist" in str(error):
            return "unfinished"
        return Fault("a build that is damaged", str(error))
    except Exception:
        return Fault("traceback where a build is loaded", traceback.format_exc())
    policy = bundle_state(stage, folder)
    if isinstance(policy, Fault):
        return policy
    if runtime.build.files != Bundle.open(stage.bundle(policy)).load_build(target).files:
        return Fault("a build of other bytes than an undisturbed one")
    if _tokens(runtime) != _tokens(DashRuntime.load(stage.bundle(policy), target)):
        return Fault("a build that gives other tokens")
    return "whole"


def _tokens(runtime: Any) -> list[int]:
    layers = runtime.bundle.manifest.policy.layers
    return list(map(int, runtime.generate([5, 9, 250, 31, 7], 2, skip=layers).tokens))


def policy_state(stage: Stage, folder: Path) -> str | Fault:
    """The name of a whole policy file whose card is its own, `unfinished` (also where only the folder beside it says
    so), or a fault.
    """
    from dash_export.bundle.policy_file import load_policy
    from dash_export.errors import DashError
    from dash_export.models import open_checkpoint

    path = folder / POLICY
    unfinished = path.with_name(f"{POLICY}.unfinished").exists()
    if not path.exists():
        return "unfinished"
    try:
        load_policy(path, open_checkpoint(stage.model).spec)
    except DashError as error:
        return Fault("a policy file that is damaged", str(error))
    name = next((name for name in SEEDS if sha(stage.policy(name)) == sha(path)), None)
    if name is None:
        return Fault("a policy file of other bytes than an undisturbed one")
    try:
        card = _card(path)
    except (OSError, ValueError) as error:
        return "unfinished" if unfinished else Fault("a policy without its card", repr(error))
    if card != _card(stage.policy(name)):
        return "unfinished" if unfinished else Fault("a policy with the card of another", f"of {name}")
    return name


def _card(policy: Path) -> dict[str, Any]:
    from dash_export.bundle.policy_file import card_path

    card: dict[str, Any] = json.loads(card_path(policy).read_text())
    return {name: value for name, value in card.items() if name != "seconds"}


def picture_state(folder: Path, expected: dict[str, str]) -> str | Fault:
    """`whole`, `unfinished` where files are missing, or a fault."""
    files = {path.name: sha(path) for path in folder.glob(f"{PICTURE}.*")}
    wrong = [name for name, digest in files.items() if expected.get(name, digest) != digest]
    if wrong:
        return Fault("a picture or report that is cut short", ", ".join(wrong))
    return "whole" if expected.keys() <= files.keys() else "unfinished"


def leftovers(folder: Path) -> list[Fault]:
    """What no run should leave: temporary names, locks, unfinished folders, files that no record lists."""
    from dash_export.bundle.bundle import Bundle
    from dash_export.bundle.layout import BUILD, MANIFEST
    from dash_export.errors import DashError

    known = {MANIFEST}
    bundle = folder / BUNDLE
    try:
        opened = Bundle.open(bundle)
        known |= {record.name for record in opened.manifest.files}
    except DashError:
        pass
    for path in bundle.glob("engines/*"):
        known |= {f"engines/{path.name}/{name}" for name in (BUILD, ".journal.json")}
        try:
            record = json.loads((path / BUILD).read_text())
            known |= {item["name"] for item in record["files"]}
        except (OSError, ValueError, KeyError):
            pass
    own = {POLICY, Path(POLICY).with_suffix(".json").name, *(f"{PICTURE}.{kind}" for kind in ("png", "svg", "json"))}
    names = {
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() or path.suffix == ".lock"
    } | {path.name for path in folder.iterdir() if path.name != BUNDLE and path.is_dir()}
    strays = sorted(names - {f"{BUNDLE}/{name}" for name in known} - own)
    kinds: dict[str, list[str]] = defaultdict(list)
    for name in strays:
        part = next((part for part in name.split("/") if part.startswith(".") or ".unfinished" in part), "")
        kinds[next(kind for sign, kind in STRAYS.items() if sign in part)].append(name)
    return [Fault(f"left behind: {kind}", ", ".join(given[:4])) for kind, given in kinds.items()]
