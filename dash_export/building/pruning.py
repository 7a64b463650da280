"""`build --no-portable`: a bundle for those who only run it, without what only another build would read."""

from contextlib import suppress
from pathlib import Path

from dash_export.bundle.bundle import Bundle
from dash_export.bundle.layout import CALIBRATION, ROUNDINGS
from dash_export.bundle.recipe import Recipe
from dash_export.errors import BundleError
from dash_export.files.artifacts import TEMPORARY, sync
from dash_export.files.outputs import folder_locked, lock_file, remove


def check_prunable(bundle: Bundle, recipe: Recipe) -> None:
    """Raise BundleError where the engines of `recipe`, or of a finished build, are the portable graphs themselves."""
    users = [recipe.name] if not recipe.on_device and recipe.dialect == "portable" else []
    for target in bundle.targets():
        with suppress(BundleError):  # a stale build runs no more in any case
            users += [] if bundle.load_build(target).files else [target]
    if users:
        raise BundleError(f"{bundle.root}: the engines for {users[0]!r} are the portable graphs, which have to stay.")


def prune(bundle: Bundle, root: Path) -> None:
    """Delete the portable graphs and what calibrations left. Raises BusyError where somebody works here."""
    with folder_locked(root, (root / "engines").glob(lock_file(Path("*")).name), shared=False):
        gone = root / f"{TEMPORARY}onnx"
        remove(gone)  # what a killed run left
        if bundle.has_graphs:
            (root / "onnx").rename(gone)  # at once, for half of the graphs would be a damaged bundle
            sync(root)
        calibrated = (path for name in (ROUNDINGS, CALIBRATION) for path in (root / "engines").glob(f"*/{name}"))
        for path in (gone, *calibrated):
            remove(path)
