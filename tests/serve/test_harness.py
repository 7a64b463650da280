"""lm-eval over HTTP, with SmolLM2: it gets what `eval` gets. pip install 'lm-eval[api]'."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lm_eval
import pytest
from lm_eval.tasks import TaskManager

from dash_export import DashRuntime
from dash_export.core.kinds import Setting
from dash_export.measure.candidates import Candidate
from dash_export.measure.tasks import DashLM
from dash_export.serve.app import Server
from dash_export.serve.scheduler import Scheduler
from tests.listening import listening

pytest.importorskip("tenacity", reason="lm-eval's clients are not installed: pip install 'lm-eval[api]'")
pytestmark = pytest.mark.model
GIVEN: dict[str, Any] = {"task_manager": TaskManager(include_defaults=False), "bootstrap_iters": 0, "log_samples": True}

QUESTIONS = [
    ("Question: What do plants need to make food?\nAnswer:", ["moonlight", "sunlight", "sand", "wind"], 1),
    ("Question: Which of these is a mammal?\nAnswer:", ["a trout", "a frog", "a dolphin", "an eagle"], 2),
    ("Question: At what temperature does water freeze?\nAnswer:", ["0 degrees Celsius", "50 degrees Celsius"], 0),
    ("Question: What does a thermometer measure?\nAnswer:", ["weight", "length", "temperature"], 2),
]
WORDS = [
    ("The capital of France is Paris, and the capital of Italy is", "Rome"),
    ("She fed the cat and the dog every day, because she loved the cat and the", "dog"),
    ("One, two, three, four, five, six, seven, eight, nine,", "ten"),
]


@pytest.fixture(scope="module")
def runtime(smollm2_runtime: Callable[..., DashRuntime]) -> DashRuntime:
    return smollm2_runtime("cpu-fp32")


@pytest.fixture(scope="module")
def url(runtime: DashRuntime) -> Iterator[str]:
    with listening(Server({"smollm2": Scheduler(runtime, rows=2)}, drain=5.0).app) as found:
        yield f"{found}/v1"


def task(folder: Path, name: str, lines: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """A task of lm-eval over lines that are written to a file."""
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    files = {"data_files": {"test": str(folder / f"{name}.jsonl")}, "cache_dir": str(folder / "cache")}
    return {"task": name, "dataset_path": "json", "dataset_kwargs": files, "test_split": "test", **more}


def words(folder: Path) -> dict[str, Any]:
    return task(
        folder, "words", [{"context": context, "target": target} for context, target in WORDS],
        output_type="generate_until", doc_to_text="{{context}}", doc_to_target="{{target}}",
        generation_kwargs={"until": ["\n\n\n"], "max_gen_toks": 8, "do_sample": False},
        process_results=lambda doc, made: {"exact": float(made[0].strip().startswith(doc["target"]))},
        metric_list=[{"metric": "exact", "aggregation": "mean", "higher_is_better": True}],
    )  # fmt: skip


@pytest.mark.parametrize("batch", [1, 3])
def test_what_eval_gets(batch: int, url: str, runtime: DashRuntime, tmp_path: Path) -> None:
    """Of multiple choice, by `echo`, and of last words, in tokens that the server makes; several prompts at once."""
    lines = [{"query": query, "choices": choices, "gold": gold} for query, choices, gold in QUESTIONS]
    choices = task(
        tmp_path, "choices", lines, output_type="multiple_choice", doc_to_text="{{query}}",
        doc_to_choice="{{choices}}", doc_to_target="{{gold}}", metric_list=[{"metric": "acc"}, {"metric": "acc_norm"}],
    )  # fmt: skip
    served = {"model": "smollm2@policy=dense", "base_url": f"{url}/completions", "tokenizer_backend": "remote"}
    tasks = [choices, words(tmp_path)]
    http = lm_eval.simple_evaluate("local-completions", served, tasks, batch_size=batch, **GIVEN)
    here = lm_eval.simple_evaluate(DashLM(Candidate(runtime, Setting("dense"))), tasks=tasks, **GIVEN)
    for metric in ("acc,none", "acc_norm,none"):
        assert http["results"]["choices"][metric] == here["results"]["choices"][metric] >= 0.5
    assert http["results"]["words"]["exact,none"] == here["results"]["words"]["exact,none"] > 0
    for theirs, ours in zip(http["samples"]["choices"], here["samples"]["choices"], strict=True):
        for (one,), (other,) in zip(theirs["resps"], ours["resps"], strict=True):
            assert one == (pytest.approx(other[0], abs=1e-2), other[1])
    assert [one["resps"] for one in http["samples"]["words"]] == [one["resps"] for one in here["samples"]["words"]]


def test_chats(url: str, runtime: DashRuntime, tmp_path: Path) -> None:
    """Each is answered as the runtime answers it."""
    given = {"model": "smollm2@policy=dense", "base_url": f"{url}/chat/completions"}
    found = lm_eval.simple_evaluate(
        "local-chat-completions", given, [words(tmp_path)], apply_chat_template=True, **GIVEN
    )
    for sample in found["samples"]["words"]:
        asked = [{"role": "user", "content": sample["doc"]["context"]}]
        wanted = "".join(step.text for step in runtime.chat(asked, 8, policy="dense"))
        assert sample["resps"] == [[wanted.partition("\n\n\n")[0]]]
