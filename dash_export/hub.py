"""Bundles on the Hugging Face hub: what runs of one is fetched, a whole one is published with its card."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from dash_export import __version__
from dash_export.bundle import BUILD, TEXT_FILES, Bundle
from dash_export.decision import recommended_budget
from dash_export.errors import BundleError, DashError
from dash_export.manifest import Build
from dash_export.names import MANIFEST, SIGNATURE

CARD = "README.md"
_MARK = "<!-- written by dash-export push -->"
_FILES = (".dash", ".gguf")
_FIRST = [MANIFEST, SIGNATURE, *TEXT_FILES, f"engines/*/{BUILD}"]
"""Files from which it is known what else a run needs."""


def is_hub_id(name: str | Path) -> bool:
    """Whether `org/name` is of the hub: nothing here has its first part, and it is no file by its ending."""
    path = Path(name)
    here = path.is_absolute() or len(path.parts) != 2 or path.parent.exists()
    return not here and path.suffix not in _FILES


def download(name: str, error: type[DashError], **wanted: Any) -> Path:
    """The folder with the files `wanted` (as `snapshot_download` says it) of `org/name`. Raises `error`."""
    hub, errors = _library(error), import_module("huggingface_hub.errors")
    known = {
        errors.GatedRepoError: "is gated: accept its terms on its page, then log in with `hf auth login`",
        errors.RepositoryNotFoundError: "is not there, or you may not read it: check the spelling, or `hf auth login`",
        errors.HFValidationError: "is neither a path that exists nor a valid hub id (org/name)",
    }
    try:
        return Path(hub.snapshot_download(name, **wanted))
    except Exception as failed:
        fault = next((text for kind, text in known.items() if isinstance(failed, kind)), "") or (
            f"cannot be downloaded ({type(failed).__name__}): the hub cannot be reached (or is switched off by "
            "HF_HUB_OFFLINE) and it is not in the local cache; connect, or give the path of a local folder"
        )
        # `from None` and no text of theirs: requests and responses can carry the access token.
        raise error(f"{name!r} on the hub {fault}") from None


def fetch(name: str, target: str | None, *, trusted: bool) -> Path:
    """The bundle `org/name` of the hub without the files that only builds need, in a folder of our cache: as it is on
    the hub now, or as it was when that cannot be reached.

    `trusted`: its signature will be checked. Without that the engines of a GPU, which are code, are not fetched: raises
    BundleError, as for a name that is no bundle's or is not there.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dash-export" / "hub" / name
    download(name, BundleError, local_dir=folder, allow_patterns=_FIRST)
    if not (folder / MANIFEST).is_file():
        raise BundleError(f"{name} on the hub is no bundle. Make one of the model: dash-export build {name}")
    bundle = Bundle.open(folder)
    build = bundle.load_build(bundle.chosen(target))
    if build.recipe.engine is not None and not trusted:
        again = f"hf download {name} --local-dir my.dash, and dash-export build my.dash --target {build.target}"
        raise BundleError(
            f"{name}: engines of a GPU are code, and nobody answers for these. Give the --trusted-key of who signed "
            f"them, or build here: {again}"
        )
    files = [record.name for record in build.files or bundle.manifest.files]
    download(name, BundleError, local_dir=folder, allow_patterns=files)
    known = {*files, *(record.name for record in bundle.manifest.files), f"engines/{build.target}/{BUILD}"}
    for path in [*folder.glob(f"engines/{build.target}/*"), *(folder / text for text in TEXT_FILES)]:
        if path.relative_to(folder).as_posix() not in known:  # of the version before
            path.unlink(missing_ok=True)
    return folder


def push(bundle: Bundle, name: str, *, private: bool, base_model: str | None, license_id: str | None) -> str:
    """Publish a bundle with its builds as `org/name`, in one commit, and return the address.

    What of an earlier push is not in it goes; a card that was not written by this, stays. Raises BundleError for a
    damaged bundle, a repository that holds something else, and when the hub refuses.
    """
    hub = _library(BundleError)
    if len(Path(name).parts) != 2 or Path(name).suffix in _FILES:
        raise BundleError(f"{name!r} is no name for the hub: expected org/name, and no file's ending.")
    builds = [bundle.load_build(target) for target in bundle.targets()]
    records = [*bundle.manifest.files, *(record for build in builds for record in build.files)]
    bundle.verify(records)
    for build in (None, *builds):
        bundle.check_listed(build)
    names = [MANIFEST, *(record.name for record in records), *(f"engines/{build.target}/{BUILD}" for build in builds)]
    names += [SIGNATURE] if bundle.path(SIGNATURE).is_file() else []
    try:
        api = hub.HfApi(library_name="dash-export", library_version=__version__)
        api.create_repo(name, private=private, exist_ok=True)
        there = set(api.list_repo_files(name))
        if MANIFEST not in there and there - {CARD, ".gitattributes"}:
            raise BundleError(f"{name} on the hub holds something else than a bundle: push to a name of its own.")
        adds = [hub.CommitOperationAdd(item, str(bundle.path(item))) for item in names]
        old = Path(hub.hf_hub_download(name, CARD)).read_text(encoding="utf-8") if CARD in there else _MARK
        if _MARK in old:
            text = card(bundle, builds, name, base_model, license_id)
            adds.append(hub.CommitOperationAdd(CARD, text.encode()))
        ours = {item for item in there if item.startswith(("engines/", "onnx/")) or item in (*TEXT_FILES, SIGNATURE)}
        gone = [hub.CommitOperationDelete(item) for item in sorted(ours - set(names))]
        done = api.create_commit(name, [*adds, *gone], commit_message=f"dash-export {__version__}")
    except DashError:
        raise
    except Exception as failed:
        # No text of theirs, as above.
        advice = "log in with `hf auth login`, check the name and the connection, and push again"
        raise BundleError(f"{name} was not published ({type(failed).__name__}): {advice}") from None
    return str(done.repo_url)


def card(bundle: Bundle, builds: Sequence[Build], name: str, base_model: str | None, license_id: str | None) -> str:
    """The model card of a bundle: what it is, how it is run, and what its builds measured."""
    hub = _library(BundleError)
    model, policy = bundle.manifest.model, bundle.manifest.policy
    data = hub.ModelCardData(
        library_name="dash-export", pipeline_tag="text-generation", tags=["onnx", "layer-skipping"],
        base_model=base_model, license=license_id,
    )  # fmt: skip
    measured = "\n".join(_measured(build) for build in builds) or "Not built yet."
    skips = f"Layers are skipped by {policy.origin}." if policy.has_network else "It has no policy of its own."
    return f"""---
{data.to_yaml()}
---
{_MARK}
# {name.partition("/")[2]}

{model.name} ({model.model_type}, {model.parameters / 1e6:.0f} M parameters, {model.num_layers} layers) as a bundle of
dash-export {__version__}: engines that skip layers, token by token. {skips}

```bash
dash-export run {name} "Why is the sky blue?"
dash-export serve {name}
```

## Measured by its builds

Time is that of a decoded token, of dense; KL and perplexity are on the calibration text, against dense.

{measured}
"""


def _measured(build: Build) -> str:
    """One build's figures as Markdown: its dial, or the dense token's time."""
    cost = build.cost
    lines = [f"`{build.target}`: dense takes {cost.dense_us / 1000:.2f} ms a token on {build.device}.", ""]
    lines = lines if cost.segment_us else [f"`{build.target}`: not measured.", ""]
    if build.dial:
        budget = recommended_budget(build.dial)
        lines += ["| time | layers | KL, nats | perplexity |", "|---|---|---|---|"]
        lines += [f"| {at.time:.3f} | {at.layers:.1f} | {at.kl:.3f} | {at.perplexity:.3f} |" for at in build.dial]
        lines += ["", f"Recommended budget: {budget:g}." if budget else "Recommended: dense.", ""]
    return "\n".join(lines)


def _library(error: type[DashError]) -> Any:
    try:
        return import_module("huggingface_hub")
    except ImportError as missing:
        raise error("The hub needs huggingface_hub: pip install 'dash-export[hub]'") from missing
