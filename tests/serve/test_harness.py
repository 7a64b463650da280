"""lm-eval over HTTP, with SmolLM2: its counts are those of `eval`. pip install 'lm-eval[api]'."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dash_export import DashRuntime
from dash_export.core.kinds import Setting
from dash_export.measure.candidates import candidates
from dash_export.measure.tasks import evaluate, matches
from dash_export.serve.app import Server
from dash_export.serve.scheduler import Scheduler
from tests.listening import listening

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'lm-eval[api]'")
pytest.importorskip("tenacity", reason="lm-eval's clients are not installed: pip install 'lm-eval[api]'")
pytestmark = pytest.mark.model

QUESTIONS = [
    ("Question: What do plants need to make food?\nAnswer:", ["moonlight", "sunlight", "sand", "wind"], 1),
    ("Question: Which of these is a mammal?\nAnswer:", ["a trout", "a frog", "a dolphin", "an eagle"], 2),
    ("Question: At what temperature does water freeze?\nAnswer:", ["0 degrees Celsius", "50 degrees Celsius"], 0),
    ("Question: What does a thermometer measure?\nAnswer:", ["weight", "length", "temperature"], 2),
    ("Question: Which planet is closest to the Sun?\nAnswer:", ["Mars", "Neptune", "Mercury", "Saturn"], 2),
    ("Question: What causes day and night?\nAnswer:", ["the Moon's light", "the Earth's rotation", "the tides"], 1),
]
WORDS = [
    ("The capital of France is Paris, and the capital of Italy is", "Rome"),
    ("He opened the letter, read it twice, and then put the", "letter"),
    ("She fed the cat and the dog every day, because she loved the cat and the", "dog"),
    ("They climbed the hill in the rain. On top of the", "hill"),
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
    """A task of lm-eval over lines that are written to a file, as `eval` reads them too."""
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    files = {"data_files": {"test": str(folder / f"{name}.jsonl")}, "cache_dir": str(folder / "cache")}
    return {"task": name, "dataset_path": "json", "dataset_kwargs": files, "test_split": "test", **more}


def words(folder: Path) -> dict[str, Any]:
    return task(
        folder, "words", [{"context": context, "target": target} for context, target in WORDS],
        output_type="generate_until", doc_to_text="{{context}}", doc_to_target="{{target}}",
        generation_kwargs={"until": ["\n\n\n"], "max_gen_toks": 8, "do_sample": False},
        process_results=lambda doc, made: {"exact": float(matches(made[0], doc["target"]))},
        metric_list=[{"metric": "exact", "aggregation": "mean", "higher_is_better": True}],
    )  # fmt: skip


@pytest.mark.parametrize("batch", [1, 3])
def test_counts_are_those_of_eval(batch: int, url: str, runtime: DashRuntime, tmp_path: Path) -> None:
    """Of multiple choice, by `echo`, and of last words, in tokens that the server makes; several prompts at once."""
    lines = [{"query": query, "choices": choices, "gold": gold} for query, choices, gold in QUESTIONS]
    choices = task(
        tmp_path, "choices", lines, output_type="multiple_choice", doc_to_text="{{query}}",
        doc_to_choice="{{choices}}", doc_to_target="{{gold}}", metric_list=[{"metric": "acc"}, {"metric": "acc_norm"}],
    )  # fmt: skip
    given = {"model": "smollm2@policy=dense", "base_url": f"{url}/completions", "tokenizer_backend": "remote"}
    tasks = [choices, words(tmp_path)]
    found = lm_eval.simple_evaluate(
        model="local-completions", model_args=given, tasks=tasks, batch_size=batch, bootstrap_iters=0
    )["results"]
    files = [tmp_path / "choices.jsonl", tmp_path / "words.jsonl"]
    (_, _, (ours,)), (_, _, (last,)) = evaluate(candidates(runtime, (Setting("dense"),)), [], files)
    assert found["choices"]["acc,none"] == pytest.approx(ours.figures["accuracy"].value)
    assert found["choices"]["acc_norm,none"] == pytest.approx(ours.figures["normalised"].value)
    assert found["words"]["exact,none"] == pytest.approx(last.figures["exact"].value)
    assert last.figures["exact"].value > 0
    assert ours.figures["normalised"].value >= 0.5


def test_chats(url: str, runtime: DashRuntime, tmp_path: Path) -> None:
    """Each is answered as the runtime answers it."""
    given = {"model": "smollm2@policy=dense", "base_url": f"{url}/chat/completions"}
    found = lm_eval.simple_evaluate(
        model="local-chat-completions", model_args=given,
        tasks=[words(tmp_path)], apply_chat_template=True, bootstrap_iters=0, log_samples=True,
    )  # fmt: skip
    for sample in found["samples"]["words"]:
        asked = [{"role": "user", "content": sample["doc"]["context"]}]
        wanted = "".join(step.text for step in runtime.chat(asked, 8, policy="dense"))
        assert sample["resps"] == [[wanted.partition("\n\n\n")[0]]]
