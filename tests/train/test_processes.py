import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dash_export.bundle.policy_file import load_policy
from dash_export.errors import DashError, RequestError
from dash_export.files.outputs import locked
from dash_export.models import Checkpoint
from dash_export.train import TrainingSettings
from dash_export.train.closed_form import Sums
from dash_export.train.corpus import Batch, read_corpus
from dash_export.train.model import GatedModel
from dash_export.train.processes import ALONE, Processes, joined
from dash_export.train.stages import Run, _optimise
from dash_export.train.training import model_text, train
from dash_export.train.work import Work
from tests.tiny import TINY_UNITS

OPTIONS = ("--steps", "6", "--window", "32", "--trade-offs", "0.5", "8")
SETTINGS = TrainingSettings(window=32, tuning_steps=6, trade_offs=(0.5, 8.0))


def torchrun(count: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    run = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count), "-m", "dash_export", "train")
    return subprocess.run(
        [*run, "--skips", *map(str, arguments)], capture_output=True, text=True, timeout=300, check=False
    )


def test_two_processes_train_one_policy(checkpoint: Checkpoint, prose: Path, tmp_path: Path) -> None:
    """The search chooses the units that one process chooses. The policy is about as good: its draws are others."""
    alone, shared = tmp_path / "alone.safetensors", tmp_path / "shared.safetensors"
    train(checkpoint, alone, [prose], settings=SETTINGS.shortened())
    ran = torchrun(2, checkpoint.source, "-o", shared, "--text", prose, *OPTIONS)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("Held out: texts") == 1, "the first process alone speaks"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        path.with_suffix(suffix).name for path in (alone, shared) for suffix in (".json", ".safetensors")
    )
    cards = [json.loads(path.with_suffix(".json").read_text()) for path in (alone, shared)]
    for what in ("units", "static_order", "tokens", "settings"):
        assert cards[0][what] == cards[1][what]
    for one, other in zip(*(card["held_out"]["texts"]["figures"] for card in cards), strict=True):
        assert other["setting"] == one["setting"]
        assert other["skipped"] == pytest.approx(one["skipped"], abs=0.2)
        assert other["kl"] == pytest.approx(one["kl"], rel=0.5, abs=1e-4)
    load_policy(shared, checkpoint.spec)


def test_shares_add_up(checkpoint: Checkpoint, model: GatedModel, prose: Path, tmp_path: Path) -> None:
    """Windows, and with them the sums of the closed form; what is random is each process's own."""
    corpus, _ = read_corpus([prose], model_text(checkpoint), 32, 0.1)
    runs = [
        Run(model, corpus, SETTINGS, Work(tmp_path, "key", processes))
        for processes in (ALONE, Processes(3, 0), Processes(3, 1), Processes(3, 2))
    ]
    (whole, rng, alone), *shares = (run.share("sums", 7) for run in runs)
    assert torch.equal(whole.ids, runs[1].batch("sums", 7)[0].ids)
    assert [len(share.ids) for share, *_ in shares] == [2, 1, 1]
    assert len({rng.random(), *(own.random() for _, own, _ in shares)}) == 4
    counted = [int(share.counted.sum()) for share, *_ in shares]
    assert [weight / 3 for *_, weight in shares] == pytest.approx(np.array(counted) / sum(counted))
    assert alone == 1

    def summed(batches: list[Batch]) -> list[torch.Tensor]:
        sums = Sums(model, TINY_UNITS)
        for batch in batches:
            sums.add(batch)
        return [*sums.tensors.values()]

    for one, other in zip(summed([whole]), summed([share for share, *_ in shares]), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_a_share_teaches_by_its_weight(
    weight: float, checkpoint: Checkpoint, model: GatedModel, prose: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    corpus, _ = read_corpus([prose], model_text(checkpoint), 32, 0.1)
    run, learnt, share = Run(model, corpus, SETTINGS, Work(tmp_path, "key")), torch.nn.Linear(2, 1), Run.share
    monkeypatch.setattr(Run, "share", lambda *given: (*share(*given)[:2], weight))
    before = learnt.weight.detach().clone()
    _optimise(run, "tuning", learnt, 1, [(learnt, 1.0)], lambda *_: learnt.weight.sum(), 1)  # type: ignore[arg-type]
    assert torch.equal(learnt.weight, before) == (weight == 0)


def test_more_processes_than_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "5")
    with joined(4) as processes:
        assert processes is ALONE, "nobody else's environment counts"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with pytest.raises(RequestError, match="4 processes at most can share them, not 5"), joined(4):
        pass


def test_a_folder_that_is_not_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Processes, "wait", lambda _: None)
    with pytest.raises(DashError, match="share the folder"):
        Work(tmp_path, "key", Processes(2, 1)).once("fit", lambda: [1])
    assert Work(tmp_path, "key", Processes(2, 0)).once("fit", lambda: [2]) == [2]
    assert Work(tmp_path, "key", Processes(2, 1)).once("fit", lambda: [3]) == [2], "the first one's"


def test_gradients_are_means(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over all processes, of which some have none. Where none has one it is 0, alone as well."""
    used, unused = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    used.grad = torch.tensor([2.0, 4.0])
    ALONE.average_gradients([used, unused])
    assert used.grad.tolist() == [2.0, 4.0]
    assert unused.grad is not None
    assert unused.grad.tolist() == [0.0, 0.0]
    monkeypatch.setattr(Processes, "add_up", lambda _, tensors: [tensor.add_(1) for tensor in tensors])
    Processes(2, 0).average_gradients([used, unused])
    assert used.grad.tolist() == [2.0, 3.0]
    assert unused.grad.tolist() == [1.0, 1.0]


@pytest.mark.slow
def test_where_one_fails_the_others_end(checkpoint: Checkpoint, prose: Path, tmp_path: Path) -> None:
    """Nothing waits for ever, and the one that failed says why. Here the first finds the output locked."""
    output = tmp_path / "policy.safetensors"
    with locked(output, "train"):
        ran = torchrun(2, checkpoint.source, "-o", output, "--text", prose, "--units", "2-3,4", *OPTIONS)
    assert ran.returncode
    assert "is being written by dash-export train" in ran.stderr
    assert not output.exists()
