"""Encoders in `dash-export run`: classes of pictures, the nearest ones of a gallery, or a file of vectors."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from dash_export.bundle.layout import check_outside_bundles
from dash_export.cli import printable
from dash_export.commands.progress import progress_bar
from dash_export.commands.tables import print_table
from dash_export.core.exits import normalized
from dash_export.core.rule import DENSE
from dash_export.core.units import layers_text
from dash_export.errors import OutputError, RequestError
from dash_export.files.artifacts import write_atomic
from dash_export.files.outputs import check_writable

if TYPE_CHECKING:
    from dash_export.core.kinds import Setting
    from dash_export.runtime import DashRuntime
    from dash_export.runtime.encoder import Encoded, Encoder

TOP = 3
"""Classes, or pictures of a gallery, that are shown."""
MOST_LETTERS = 60
"""Letters of a text that are shown."""
_WRITTEN = ("pooled", "actions", "guarded")
MARK = "dash_export_features"
"""Array in every file of features: only such a file is replaced."""


def encode_inputs(
    runtime: DashRuntime,
    given: str,
    lines: Sequence[str],
    setting: Setting,
    gallery: Path | None = None,
    output: Path | None = None,
    as_json: bool = False,
) -> None:
    """Encode a picture or all pictures in a folder; for a text encoder a text, or the `lines` of a file. Print a row
    for each, or write `output`. Raises RequestError.
    """
    takes, path = runtime.bundle.manifest.model.takes, Path(given)
    inputs: Sequence[Any] = lines or [given]
    names = list(inputs)
    if takes == "pictures":
        if lines:
            raise click.UsageError("--prompts is of a model that takes text: give a picture, or a folder of pictures.")
        from dash_export.images.sources import image_files  # needs Pillow, which texts do not

        inputs = image_files(path) if path.is_dir() else [path]
        names = [one.relative_to(path if path.is_dir() else path.parent).as_posix() for one in inputs]
    elif gallery is not None:
        raise click.UsageError("--gallery is of an encoder of pictures.")
    if output is not None:
        _check_output(output)
    encoder = runtime.encoder_with(setting)
    known = None if gallery is None else _Gallery(encoder, gallery)
    with progress_bar("run") as progress:

        def encoded() -> Iterator[Encoded]:
            for place, found in enumerate(encoder.stream(inputs), 1):
                yield found
                progress("encoding", place, len(inputs))

        if output is not None:
            _write(output, takes, names, list(encoded()))
            return
        key = {"pictures": "file", "texts": "text"}[takes]
        rows = [{key: str(one), **_row(found, known)} for one, found in zip(inputs, encoded(), strict=True)]
    if as_json:
        for row in rows:
            click.echo(json.dumps(row))
        return
    print_table(
        f"{runtime.bundle.name}, target {runtime.build.target}", (runtime.bundle.manifest.measure.item, "answer"),
        ("layers", "skipped", "ms"),
        (
            (
                printable(Path(row[key]).name if takes == "pictures" else row[key][:MOST_LETTERS]),
                ", ".join(f"{printable(name)} {score:.2f}" for name, score in row["nearest"]) or "a vector",
                row["layers"],
                "guarded" if row["guarded"] else row["skipped"],
                f"{1000 * row['seconds']:.0f}",
            )
            for row in rows
        ),
    )  # fmt: skip


class _Gallery:
    """Pictures to compare with, by the cosine of their pooled vectors, which are dense ones."""

    def __init__(self, encoder: Encoder, folder: Path) -> None:
        from dash_export.images.sources import image_files

        files = image_files(folder)
        dense = encoder.under(DENSE)
        self.names = [path.name for path in files]
        self._vectors = np.concatenate([normalized(found.pooled) for found in dense.stream(files)])

    def nearest(self, pooled: np.ndarray[Any, Any]) -> list[tuple[str, float]]:
        cosines = self._vectors @ normalized(pooled)[0]
        return [(self.names[place], float(cosines[place])) for place in np.argsort(-cosines)[:TOP]]


def _row(found: Encoded, gallery: _Gallery | None) -> dict[str, Any]:
    nearest: list[tuple[str, float]] = []
    if gallery is not None:
        nearest = gallery.nearest(found.pooled)
    elif found.probabilities is not None:
        order = np.argsort(-found.probabilities[0])[:TOP]
        nearest = [(found.classes[place], float(found.probabilities[0, place])) for place in order]
    skipped = np.flatnonzero(found.actions[0])
    return {
        "nearest": [[name, round(score, 5)] for name, score in nearest],
        "layers": int((found.actions[0] == 0).sum()),
        "skipped": layers_text(skipped.tolist()),
        "guarded": bool(found.guarded[0]),
        "seconds": round(found.seconds, 5),
    }


def _check_output(output: Path) -> None:
    """Raise RequestError or OutputError, before the work, for a file that could not be written or is not ours."""
    if output.suffix != ".npz":
        raise RequestError(f"A file of features is called NAME.npz, not {output.name}.")
    check_outside_bundles(output)
    check_writable(output.absolute().parent)
    if output.exists() or output.is_symlink():
        try:
            with np.load(output, allow_pickle=False) as known:
                ours = MARK in known.files
        except (OSError, ValueError):
            ours = False
        if output.is_symlink() or not ours:
            raise OutputError(f"{output} exists and holds no features of ours: choose another output (-o).")


def _write(output: Path, takes: str, names: list[str], results: list[Encoded]) -> None:
    packed = io.BytesIO()
    arrays: dict[str, Any] = {name: np.concatenate([getattr(found, name) for found in results]) for name in _WRITTEN}
    arrays["files" if takes == "pictures" else "texts"] = np.array(names)
    np.savez(packed, dash_export_features=np.array(1), **arrays)
    write_atomic(output, packed.getvalue())
    layers = float(np.mean([(found.actions == 0).sum(axis=1).mean() for found in results]))
    seconds = float(np.median([found.seconds for found in results]))
    guarded = sum(int(found.guarded.sum()) for found in results)
    click.echo(
        f"{output}: pooled vectors of {len(results)} {takes}; {layers:.1f} layers and {1000 * seconds:.0f} ms each, "
        f"{guarded} guarded"
    )
