from collections.abc import Iterator

import pytest
import torch

from dash_export.models import Checkpoint
from dash_export.train.model import GatedModel
from tests.tiny import tiny_checkpoint


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
