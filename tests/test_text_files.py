"""Files that a user names: a pipe is not waited for, and a file that claims gigabytes is not read."""

from __future__ import annotations

import os
import signal
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dash_export.commands.run_batch import read_prompts as read_plain_prompts
from dash_export.errors import DashError, RequestError
from dash_export.evaluation.data import read_items
from dash_export.models import open_checkpoint
from dash_export.policy.corpus import read_corpus, read_prompts
from dash_export.policy_file import load_policy
from dash_export.targets import load_recipe
from dash_export.text_files import read_text
from tests.models.helpers import tiny_tokenizer
from tests.test_policy_file import SPEC
from tests.tiny import save_model

READERS: dict[str, Callable[[Path], object]] = {
    "text.txt": read_text,
    "tasks.jsonl": read_items,
    "chats.jsonl": read_prompts,
    "corpus.txt": lambda path: read_corpus([path], tiny_tokenizer(), 32, 0.1),
    "recipe.toml": lambda path: load_recipe(str(path)),
    "policy.safetensors": lambda path: load_policy(path, SPEC),
    "model.gguf": open_checkpoint,
    "config.json": lambda path: open_checkpoint(path.parent),
    "tokenizer.json": lambda path: open_checkpoint(path.parent),
    "chat_template.jinja": lambda path: open_checkpoint(path.parent),
}


@pytest.fixture
def in_time() -> Iterator[None]:
    """A reader that waits for a pipe fails."""

    def stop(*_: object) -> None:
        raise TimeoutError

    old = signal.signal(signal.SIGALRM, stop)
    signal.alarm(5)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, old)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_model(folder)
    return folder


@pytest.mark.usefixtures("in_time")
@pytest.mark.parametrize("kind", ["pipe", "sparse"])
@pytest.mark.parametrize("name", READERS)
def test_a_pipe_and_a_huge_file_are_refused_at_once(name: str, kind: str, model: Path, tmp_path: Path) -> None:
    for file in model.iterdir():
        (tmp_path / file.name).symlink_to(file)
    path = tmp_path / name
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.touch()
        os.truncate(path, (1 << 30) + 1)
    if (name, kind) == ("chat_template.jinja", "pipe"):
        assert "chat_template.jinja" not in open_checkpoint(tmp_path).assets
        return
    tracemalloc.start()
    with pytest.raises(DashError):
        READERS[name](path)
    assert tracemalloc.get_traced_memory()[1] < 100 << 20
    tracemalloc.stop()


def test_prompts_may_come_through_a_pipe() -> None:
    """As from `--prompts <(command)`."""
    read, write = os.pipe()
    os.write(write, b"one\ntwo\n")
    os.close(write)
    assert read_plain_prompts(Path(f"/dev/fd/{read}")) == ["one", "two"]
    os.close(read)


def test_line_ends_are_one(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_bytes("a\r\nb\rc\n\u2028".encode())
    assert read_text(tmp_path / "t.txt") == "a\nb\nc\n\u2028"


@pytest.mark.parametrize("name", ["nul\0", "."])
def test_names_that_are_no_file(name: str) -> None:
    for read in (read_text, read_items):
        with pytest.raises(RequestError):
            read(Path(name))
