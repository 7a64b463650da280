"""Tasks of lm-eval, offline, against what sessions give directly; a candidate as lm-eval's model."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from dash_export import DashRuntime
from dash_export.errors import DashError, RequestError
from dash_export.measure import tasks
from dash_export.measure.candidates import Candidate, candidates
from dash_export.measure.tasks import DashLM, load_tasks, run_task
from tests.measure.test_score import SETTINGS
from tests.tiny import TEXT, log_softmax

PROMPT = "The layers of a decoder"
SETTING = SETTINGS[2]
QUESTIONS = [
    {"query": f"{PROMPT} ", "choices": ["are not equally needed", "hardly", "at all, and some"], "gold": 0},
    {"query": "Some of them", "choices": ["hardly at all", "of a decoder"], "gold": 1},
    {"query": "Some of them", "choices": ["of a decoder", "needed at all"], "gold": 0},
    {"query": "Some of them", "choices": ["hardly at all", "the layers"], "gold": 0},
    {"query": "And", "choices": ["equally, and hardly", ","], "gold": 0},
]
CHOICES = """output_type: multiple_choice
doc_to_text: "{{query}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{gold}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
ANSWERS = """output_type: generate_until
doc_to_text: "{{context}}"
doc_to_target: "{{target}}"
generation_kwargs: {until: ["\\n\\n\\n"], max_gen_toks: 4}
metric_list: [{metric: exact_match}]
filter_list:
  - {name: letter, filter: [{function: regex, regex_pattern: "(.)"}, {function: take_first}]}
  - {name: whole, filter: [{function: take_first}]}
"""
WORDS = """output_type: loglikelihood
doc_to_text: "{{query}}"
doc_to_target: " {{choices[gold]}}"
metric_list: [{metric: perplexity}, {metric: acc}]
"""


def write_task(folder: Path, name: str, lines: list[dict[str, Any]], form: str) -> None:
    """Write a task's YAML, which reads lines from a file beside it."""
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = f"{{data_files: {{test: {file}}}, cache_dir: {folder / 'cache'}}}"
    head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {data}\ntest_split: test\n"
    (folder / f"{name}.yaml").write_text(head + form)


def test_choices(runtime: DashRuntime, tmp_path: Path) -> None:
    write_task(tmp_path, "own", QUESTIONS, CHOICES)
    ((name, task),) = load_tasks(["own"], tmp_path, 9).items()
    results = run_task(name, task, candidates(runtime, SETTINGS), 9)
    right: list[list[bool]] = []
    for setting, result in zip(SETTINGS, results, strict=True):
        raw, normalised, free = [], [], 0
        for question in QUESTIONS:
            likelihoods = []
            for choice in question["choices"]:
                count = len(runtime.text.encode(question["query"].rstrip()))
                ids = runtime.text.encode(f"{question['query']} {choice}")
                q = log_softmax(runtime.session_with(setting).logits(ids, prefix=count))
                likelihoods.append(sum(q[i - 1, ids[i]] for i in range(count, len(ids))))
                free += len(ids) - 1 - count
            raw.append(np.argmax(likelihoods) == question["gold"])
            lengths = [len(choice) for choice in question["choices"]]
            normalised.append(np.argmax(np.array(likelihoods) / lengths) == question["gold"])
        right.append(normalised)
        figures = {name: figure.value for name, figure in result.figures.items()}
        assert figures == {
            "acc": np.mean(raw),
            "acc_norm": np.mean(normalised),
            "lost": np.mean(np.array(right[0]) & ~np.array(normalised)),
            "won": np.mean(~np.array(right[0]) & np.array(normalised)),
        }
        assert (result.items, result.tokens) == (len(QUESTIONS), free)
        assert result.figures["acc"].low < figures["acc"] < result.figures["acc"].high
    assert (results[0].layers, results[1].layers) == (6, 3)
    static = results[1].figures
    assert static["lost"].value > static["won"].value > 0


def test_answers(runtime: DashRuntime, tmp_path: Path) -> None:
    """Each candidate's own answer is a target: dense and static answer otherwise."""
    prompts = [PROMPT, "Some of them", "And some"]
    made = [[runtime.session_with(each).generate(prompt, 4).text for prompt in prompts] for each in SETTINGS]
    assert made[0][0] != made[1][0]
    targets = [made[0][0], made[1][1], "no such answer"]
    lines = [{"context": prompt, "target": target} for prompt, target in zip(prompts, targets, strict=True)]
    write_task(tmp_path, "own", lines, ANSWERS)
    results = run_task("own", load_tasks(["own"], tmp_path, 9)["own"], candidates(runtime, SETTINGS), 9)
    right = [[text == target for text, target in zip(texts, targets, strict=True)] for texts in made]
    for result, own in zip(results, right, strict=True):
        figures = {name: figure.value for name, figure in result.figures.items()}
        lost, won = (sum(a > b for a, b in zip(*pair, strict=True)) for pair in ((right[0], own), (own, right[0])))
        expected = {"exact_match_letter": 0, "exact_match_whole": sum(own) / 3, "lost": lost / 3, "won": won / 3}
        assert figures == pytest.approx(expected)
        assert result.tokens == 3 * 3, "the prompt predicts the first of four"


def test_what_is_no_mean_has_no_interval(runtime: DashRuntime, tmp_path: Path) -> None:
    write_task(tmp_path, "own", QUESTIONS, WORDS)
    (dense,) = run_task("own", load_tasks(["own"], tmp_path, 2)["own"], candidates(runtime, SETTINGS[:1]), 2)
    assert [*dense.figures] == ["acc", "perplexity", "lost", "won"]
    totals = []
    for question in QUESTIONS[:2]:
        ids = runtime.text.encode(f"{question['query']} {question['choices'][question['gold']]}")
        count = len(runtime.text.encode(question["query"].rstrip()))
        totals.append(runtime.session("dense").score(ids).log_likelihoods[count - 1 :].sum())
    found = dense.figures["perplexity"]
    assert np.isfinite(found.value)
    assert found.low == found.value == found.high == pytest.approx(np.exp(-np.mean(totals, dtype=np.float64)), rel=1e-3)


@pytest.mark.parametrize(
    ("name", "form", "says"),
    [
        ("nonsuch", CHOICES, "no task 'nonsuch'"),
        ("own", CHOICES.replace("query", "question"), "cannot load the task 'own' .*'question' is undefined"),
        ("own", CHOICES.replace("multiple_choice", "magic"), "cannot load the task 'own'"),
        ("own", CHOICES + "unsafe_code: true\n", "HF_ALLOW_CODE_EVAL=1 permits it"),
    ],
)
def test_a_task_that_cannot_be_run(
    name: str, form: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    own = partial(TaskManager, include_defaults=False)  # 14,000 files less to read
    monkeypatch.setattr(tasks, "TaskManager", lambda include_path, **_: own(include_path=include_path))
    write_task(tmp_path, "own", QUESTIONS, form)
    with pytest.raises(RequestError, match=says) as caught:
        load_tasks([name], tmp_path, 9)
    assert len(str(caught.value)) < 600


@pytest.fixture
def model(runtime: DashRuntime, monkeypatch: pytest.MonkeyPatch) -> DashLM:
    monkeypatch.setattr(runtime.text, "eos_ids", frozenset({299}))  # the tiny tokenizer names none
    return DashLM(Candidate(runtime, SETTING))


def requests(*arguments: Any) -> list[Instance]:
    return [Instance("loglikelihood", {}, arguments, 0)]


def test_an_empty_context_and_greedy_text(model: DashLM, runtime: DashRuntime) -> None:
    ids = [299, *runtime.text.encode("hardly at all")]
    q = log_softmax(runtime.session_with(SETTING).logits(ids, prefix=1))
    ((total, greedy),) = model.loglikelihood(requests("", "hardly at all"))
    assert total == pytest.approx(sum(q[i - 1, ids[i]] for i in range(1, len(ids))), rel=1e-4)
    assert greedy == all(q[i - 1].argmax() == ids[i] for i in range(1, len(ids)))
    ids = runtime.text.encode(PROMPT)
    made = runtime.session_with(SETTING).generate(ids, 6).tokens.tolist()
    assert model._score(ids, made)[1]
    assert not model._score(ids, [*made[:-1], (made[-1] + 1) % 300])[1]


def test_rolling_scores_every_token_once(model: DashLM, runtime: DashRuntime) -> None:
    (total,) = model.loglikelihood_rolling(requests(PROMPT))
    ids = np.array([299, *runtime.text.encode(PROMPT)])
    assert total == pytest.approx(float(runtime.session_with(SETTING).score(ids).log_likelihoods.sum()), rel=1e-4)
    assert len(runtime.text.encode(TEXT)) > model.max_length
    model.actions.clear()
    assert np.isfinite(model.loglikelihood_rolling(requests(TEXT))[0])
    assert len(model.actions) > 1


def test_generation(model: DashLM, runtime: DashRuntime) -> None:
    plain = runtime.session_with(SETTING).generate(PROMPT, 12).text
    stop, options = plain[len(plain) // 2], {"until": [], "max_gen_toks": 12}
    assert model.generate_until(requests(PROMPT, options)) == [plain]
    assert model.generate_until(requests(PROMPT, options | {"until": [stop]})) == [plain[: plain.index(stop)]]
    for wrong, says in (({"num_beams": 2}, "'num_beams' of the task"), ({"max_gen_toks": 9999}, "9999")):
        with pytest.raises(DashError, match=says):
            model.generate_until(requests(PROMPT, options | wrong))


def test_one_bos_before_a_chat(model: DashLM, runtime: DashRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    """A template writes it, and the tokenizer would add another one."""
    begins, encode = runtime.text.tokenizer.token_to_id("<|im_start|>"), runtime.text.encode

    def with_bos(text: str, *, special: bool = True, **options: Any) -> list[int]:
        return [begins] * special + encode(text, special=False, **options)

    monkeypatch.setattr(runtime.text, "encode", with_bos)
    chat = model.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert model.tok_encode(chat) == encode(chat, special=False)
    assert model.tok_encode("Hi") == [begins, *encode("Hi", special=False)]
