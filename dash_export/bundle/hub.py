"""Bundles on the Hugging Face hub. `load_from_hub` fetches what a run needs; `push` publishes a bundle with a card.

~/.cache/dash-export/hub/org/name/
  <commit>/                 a version, as far as it was fetched; a process that runs it holds a lock on it
  <target>[+signed].version the commit that this target was loaded from last, without or with a key
"""

import logging
import re
from collections.abc import Callable
from contextlib import ExitStack, suppress
from glob import escape
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from dash_export import __version__
from dash_export.bundle import layout
from dash_export.bundle.bundle import LARGEST_RECORD, Bundle, parsed
from dash_export.bundle.records import Manifest
from dash_export.core.dial import recommended_budget
from dash_export.errors import BundleError, BusyError, DashError, StaleBuildError
from dash_export.files.artifacts import identity, read_bounded, write_atomic
from dash_export.files.outputs import folder_locked, lock_while_alive, remove

logger = logging.getLogger(__name__)
CARD = "README.md"
_FIRST = [
    layout.MANIFEST,
    layout.SIGNATURE,
    *layout.TEXT_FILES,
    layout.PREPROCESSOR,
    layout.ANSWERS,
    f"engines/*/{layout.BUILD}",
]
"""Files to fetch first: they tell which other files a run needs."""
_SECONDS = 10

_T = TypeVar("_T")
_Trusted = Callable[[Bundle], None] | None
"""Check that raises BundleError for a bundle that may not run."""


def download(name: str, error: type[DashError], **wanted: Any) -> Path:
    """Fetch files of `org/name` and return their folder; `wanted`: arguments of `snapshot_download`. Raises `error`."""
    return Path(_call_hub(name, error, lambda hub: hub.snapshot_download(name, **wanted)))


def load_from_hub(name: str, target: str | None, trusted: _Trusted, load: Callable[[Bundle], _T]) -> _T:
    """Fetch from the hub what a run needs of the bundle `org/name`, and return what `load` makes of it. Where the hub
    cannot be reached, or its version is damaged or not trusted, the version that was loaded last is taken, with a
    warning. Without `trusted` the engines of a GPU, which are code, are refused. Other processes wait. Raises
    BundleError.
    """
    base = layout.cache_folder() / "hub" / name
    try:
        base.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BundleError(f"{error.filename} cannot be made ({error.strerror}): set XDG_CACHE_HOME.") from error
    with folder_locked(base, [], shared=False, wait=True):
        asked = quote(target, safe="")[:200] if target else "(default)"
        pointers = [base / f"{asked}{ending}.version" for ending in (["+signed", ""] if trusted else [""])]
        found = [_version(path) for path in pointers if path.is_file()]
        known = next((version for version in found if version and (base / version).is_dir()), None)
        try:
            version = _call_hub(name, BundleError, lambda hub: hub.HfApi().model_info(name, timeout=_SECONDS).sha)
            made = _load_version(name, base / version, target, trusted, load)
        except BundleError as error:
            if known is None:
                raise
            said = str(error)  # a logged error's traceback would keep the bundle alive
            made = load(_held(base / known, name))
            logger.warning("%s\nThe version of %s that was loaded last runs.", said, name)
            return made
        if version != known or not pointers[0].is_file():
            write_atomic(pointers[0], version)
            wanted = {*map(_version, base.glob("*.version"))}
            for path in base.iterdir():
                if path.is_dir() and path.name not in wanted:
                    with suppress(BusyError), folder_locked(path, [], shared=False):  # unless a process runs it
                        remove(path)
        return made


def cached() -> dict[str, int]:
    """Return the bundles of the hub that are in the cache, org/name, and the bytes that each takes."""
    base = layout.cache_folder() / "hub"
    return {
        folder.relative_to(base).as_posix(): sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())
        for folder in sorted(base.glob("*/*"))
        if folder.is_dir()
    }


def remove_cached(name: str) -> None:
    """Remove the bundle `org/name` from the cache. Raises BundleError where it is not there, BusyError where a process
    runs or fetches it.
    """
    if name not in (known := cached()):
        raise BundleError(f"{name} is not in the cache. What is there: {', '.join(known) or 'nothing'}.")
    base = layout.cache_folder() / "hub" / name
    try:
        with ExitStack() as held:
            for folder in (base, *filter(Path.is_dir, base.iterdir())):
                held.enter_context(folder_locked(folder, [], shared=False))
            remove(base)
    except BusyError as error:
        raise BusyError(f"{name} is in use: end the program that runs it, and remove it again.") from error


def _version(pointer: Path) -> str | None:
    """Return the commit that a pointer file names; None where the file is damaged."""
    text = pointer.read_text(encoding="utf-8", errors="replace")
    return text if re.fullmatch(r"[0-9a-f]{40}", text) else None


def _held(root: Path, name: str) -> Bundle:
    """Open the bundle of a version and lock the version while the object lives: an engine may be loaded later."""
    bundle = Bundle.open(root, name.rpartition("/")[2])
    lock_while_alive(root, bundle)
    return bundle


def _load_version(name: str, root: Path, target: str | None, trusted: _Trusted, load: Callable[[Bundle], _T]) -> _T:
    """Fetch what a run needs of one version into `root`, and load it. Damaged files are fetched anew, once."""
    for again in (False, True):
        wanted = {"revision": root.name, "local_dir": root}
        download(name, BundleError, **wanted, allow_patterns=_FIRST)
        if not (root / layout.MANIFEST).is_file():
            raise BundleError(f"{name} on the hub is no bundle. Make one of the model: dash-export build {name}")
        try:
            bundle = Bundle.open(root)
            build = bundle.load_build(bundle.resolve_target(target))
            if trusted is not None:
                trusted(bundle)
            elif build.recipe.on_device:
                break
            files = [escape(record.name) for record in build.files or bundle.manifest.files]
            download(name, BundleError, **wanted, allow_patterns=files)
            return load(_held(root, name))
        except BundleError:
            if again:
                raise
            _forget_damaged(root, target)
    here = f"hf download {name} --local-dir my.dash, and dash-export build my.dash --target {build.target}"
    raise BundleError(
        f"{name}: engines of a GPU are code, and nobody answers for these. Give the --trusted-key of who signed them, "
        f"or build here: {here}"
    )


def _forget_damaged(root: Path, target: str | None) -> None:
    with suppress(BundleError):
        bundle = Bundle.open(root)
        build = bundle.load_build(bundle.resolve_target(target))
        for record in (*bundle.manifest.files, *build.files):
            path = bundle.path(record.name)
            if path.is_dir() or (path.is_file() and not record.matches(path, True)):
                remove(path)
    for path in (root / layout.MANIFEST, root / layout.SIGNATURE, *root.glob(f"engines/*/{layout.BUILD}")):
        remove(path)


def push(bundle: Bundle, name: str, *, private: bool, base_model: str | None, license_id: str | None) -> str:
    """Publish a bundle with its builds as `org/name`, in one commit, and return the address. A repository that has no
    card gets one. Files of an earlier bundle that this one lacks are deleted. Raises BundleError for a damaged bundle,
    a repository that holds something else, and when the hub refuses.
    """
    if len(Path(name).parts) != 2 or Path(name).suffix in layout.NO_HUB_ID:
        raise BundleError(f"{name!r} is no name for the hub: expected org/name, and no file's ending.")
    builds = []
    for target in bundle.targets():
        with suppress(StaleBuildError):
            builds.append(bundle.load_build(target))
    records = [*bundle.files, *(record for build in builds for record in build.files)]
    seal = bundle.verify(records)
    for build in (None, *builds):
        bundle.check_listed(build)
    names = [
        layout.MANIFEST,
        *(record.name for record in records),
        *(f"engines/{build.target}/{layout.BUILD}" for build in builds),
    ]
    names += [layout.SIGNATURE] if bundle.path(layout.SIGNATURE).is_file() else []
    seal |= {item: identity(bundle.path(item)) for item in names if item not in seal}

    def publish(hub: Any) -> str:
        api = hub.HfApi(library_name="dash-export", library_version=__version__)
        api.create_repo(name, private=private, exist_ok=True)
        there = set(api.list_repo_files(name))
        old = _pushed(name, there, lambda file: Path(hub.hf_hub_download(name, file)))
        if layout.SIGNATURE in there - set(names):
            logger.warning("%s was signed, and this bundle is not: sign it, and push again.", name)
        done = api.upload_folder(
            repo_id=name, folder_path=bundle.root, allow_patterns=list(map(escape, names)), delete_patterns=old,
            commit_message=f"dash-export {__version__}",
        )  # fmt: skip
        try:
            bundle.check_same(seal)
        except BundleError as error:
            raise BundleError(
                f"{name} was published, but of files that changed meanwhile: push again. {error}"
            ) from error
        if CARD not in there:
            data = hub.ModelCardData(
                library_name="dash-export", pipeline_tag=bundle.manifest.measure.pipeline,
                tags=["onnx", "layer-skipping"], base_model=base_model, license=license_id,
            )  # fmt: skip
            facts = {"name": name, "version": __version__, "manifest": bundle.manifest, "builds": builds}
            card = hub.ModelCard.from_template(data, template_str=_CARD, recommended=recommended_budget, **facts)
            api.upload_file(repo_id=name, path_in_repo=CARD, path_or_fileobj=str(card).encode())
        return str(done.repo_url)

    advice = "log in with `hf auth login`, and push again"
    return str(_call_hub(name, BundleError, publish, "was not published", advice))


def _pushed(name: str, there: set[str], read: Callable[[str], Path]) -> list[str]:
    """Return patterns of the bundle's files in a repository; `read` downloads one. Raises BundleError for no bundle."""
    if not there - {CARD, ".gitattributes"}:
        return []
    try:
        if layout.MANIFEST not in there:
            raise BundleError(f"there is no {layout.MANIFEST}")
        old = parsed(Manifest, read_bounded(read(layout.MANIFEST), LARGEST_RECORD), Path(name), layout.MANIFEST)
    except BundleError as error:
        other = f"{name} on the hub holds something else than a bundle of this version: push to a name of its own."
        raise BundleError(other) from error
    listed = map(escape, (layout.MANIFEST, layout.SIGNATURE, *(record.name for record in old.files)))
    return [*listed, *(f"engines/{escape(target)}/*" for target in old.builds)]  # folders wholly of the bundle


_CARD = """---
{{ card_data }}
---
# {{ name.partition("/")[2] }}

{% set model, policy = manifest.model, manifest.policy -%}
{{ model.name }} ({{ model.model_type }}, {{ "%.0f" | format(model.parameters / 1e6) }} M parameters,
{{ model.num_layers }} layers) as a bundle of dash-export {{ version }}: engines that skip layers, token by token.
{{ "Layers are skipped by " ~ policy.origin if policy.has_network else "It has no policy of its own" }}.

```bash
dash-export run {{ name }} {{ manifest.measure.example }}
dash-export serve {{ name }}
```

## Measured by its builds

Time is that of a decoded token or of a picture, of dense; all else is on the calibration data, against dense.
{% for build in builds %}{% set ms = build.cost.dense_us / 1000 %}
`{{ build.target }}`:
{%- set taken = "dense takes %.2f ms a %s on %s." | format(ms, manifest.measure.item, build.device) %}
{{ taken if build.cost.segment_us else "not measured." }}
{% if build.dial %}
| time | layers | {{ manifest.measure.divergence }} | perplexity |
|---|---|---|---|
{% for at in build.dial -%}
| {{ "%.3f | %.1f | %.3f | %.3f" | format(at.time, at.layers, at.kl, at.perplexity) }} |
{% endfor %}
Recommended: {{ recommended(build.dial, manifest.measure) or "dense" }}.
{% endif %}
{%- else %}
Not built yet.
{% endfor %}"""
"""Template of the card that a new repository gets; an existing card is the owner's."""


def _call_hub(
    name: str, error: type[DashError], ask: Callable[[Any], Any], failed: str = "cannot be downloaded", advice: str = ""
) -> Any:
    """Return `ask(huggingface_hub)`. Raises `error` in place of what `ask` raises."""
    try:
        hub, errors = import_module("huggingface_hub"), import_module("huggingface_hub.errors")
    except ImportError as missing:
        raise error("The hub needs huggingface_hub: pip install 'dash-export[hub]'") from missing
    advice = advice or (
        "the hub cannot be reached (or is switched off by HF_HUB_OFFLINE) and it is not in the local cache; connect, "
        "or give the path of a local folder"
    )
    known = {
        errors.GatedRepoError: "is gated: accept its terms on its page, then log in with `hf auth login`",
        errors.RepositoryNotFoundError: "is not there, or you may not read it: check the spelling, or `hf auth login`",
        errors.HFValidationError: "is neither a path that exists nor a valid hub id (org/name)",
        errors.OfflineModeIsEnabled: f"{failed} (HF_HUB_OFFLINE is set): {advice}",
    }
    try:
        return ask(hub)
    except DashError:
        raise
    except Exception as raised:
        local = isinstance(raised, OSError) and raised.filename is not None  # a full disk, say
        fault = next((text for kind, text in known.items() if isinstance(raised, kind)), "") or (
            f"{failed}: {raised.filename} cannot be read or written ({raised.strerror})"  # type: ignore[attr-defined]
            if local
            else f"{failed} ({type(raised).__name__}): {advice}"
        )
        # `from None`, without the library's text: requests and responses can carry the access token.
        raise error(f"{name!r} on the hub {fault}") from None
