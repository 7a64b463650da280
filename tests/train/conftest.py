from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from dash_export.models import Checkpoint
from dash_export.train.model import GatedModel
from dash_export.train.training import train
from tests.tiny import TINY_UNITS, tiny_checkpoint
from tests.train.helpers import SETTINGS, Learn, Trained


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> Iterator[None]:
    """Of which a tiny model needs no more, and two that wait for a busy core are slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_checkpoint(tmp_path_factory.mktemp("policy") / "model")


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoint) -> GatedModel:
    return GatedModel(checkpoint, torch.device("cpu"), torch.float32)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "policy.safetensors"


@pytest.fixture
def learn(checkpoint: Checkpoint, output: Path, prose: Path) -> Learn:
    """`learn(**options)`: a training of the tiny model into `output`, of its usual units unless told otherwise."""
    return partial(train, model=checkpoint, output=output, texts=[prose], settings=SETTINGS, units=TINY_UNITS)


@pytest.fixture(scope="package")
def trained(checkpoint: Checkpoint, prose: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    path = tmp_path_factory.mktemp("trained") / "policy.safetensors"
    return path, train(checkpoint, path, [prose], units=TINY_UNITS, settings=SETTINGS)
