"""The model class of lm-eval: through its registry, and in an evaluation of a task of our own."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dash_export import DashRuntime
from dash_export.core.kinds import Setting
from dash_export.errors import PolicyError, RequestError
from dash_export.measure.candidates import candidates
from dash_export.measure.score import score
from dash_export.measure.tasks import ChoiceScore, Question, encode_pair
from tests.tiny import log_softmax

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install lm-eval")
SETTING = Setting("token", skipped=1.5)


@pytest.fixture(scope="module")
def model(tiny_root: Path) -> Any:
    from lm_eval.api.registry import get_model

    import examples.lm_eval_harness  # noqa: F401

    arguments = f"bundle={tiny_root},target=cpu-fp32,policy=token,skipped=1.5"
    made = get_model("dash").create_from_arg_string(arguments, {"batch_size": 1, "device": None})
    made.runtime.text.eos_ids = frozenset({299})  # the tiny tokenizer names none
    return made


def requests(*arguments: tuple[Any, ...]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(request_type="loglikelihood", doc={}, arguments=given, idx=0) for given in arguments]


def test_loglikelihood(model: Any, runtime: DashRuntime) -> None:
    pairs = [("The layers of a decoder", " are not equally needed"), ("Some ", "of them"), ("", "hardly at all")]
    found = model.loglikelihood(requests(*pairs), disable_tqdm=True)
    for (context, continuation), (total, greedy) in zip(pairs, found, strict=True):
        ids, count = encode_pair(runtime, context, continuation)
        if not context:
            ids, count = [299, *ids], 1
        q = log_softmax(runtime.session_with(SETTING).logits(ids, prefix=count))
        assert total == pytest.approx(sum(q[i - 1, ids[i]] for i in range(count, len(ids))), rel=1e-4)
        assert greedy == all(q[i - 1].argmax() == ids[i] for i in range(count, len(ids)))


def test_what_decode_writes_is_greedy(model: Any, runtime: DashRuntime) -> None:
    ids = runtime.text.encode("The layers of a decoder")
    made = runtime.session_with(SETTING).generate(ids, 6).tokens.tolist()
    assert model._score(ids, made)[1]
    assert not model._score(ids, [*made[:-1], (made[-1] + 1) % 300])[1]


def test_rolling_scores_every_token_once(model: Any, runtime: DashRuntime) -> None:
    (total,) = model.loglikelihood_rolling(requests(("The layers of a decoder",)), disable_tqdm=True)
    ids = np.array([model.prefix_token_id, *runtime.text.encode("The layers of a decoder")])
    assert total == pytest.approx(float(runtime.session_with(SETTING).score(ids).log_likelihoods.sum()), rel=1e-4)
    longer = "are needed and " * 120
    assert len(runtime.text.encode(longer)) > 600
    (total,) = model.loglikelihood_rolling(requests((longer,)), disable_tqdm=True)
    assert np.isfinite(total)


def test_generate_until(model: Any, runtime: DashRuntime) -> None:
    prompt = "The layers of a decoder"
    plain = runtime.session_with(SETTING).generate(prompt, 12).text
    options = {"until": [], "max_gen_toks": 12}
    assert model.generate_until(requests((prompt, options)), disable_tqdm=True) == [plain]
    stop = plain[len(plain) // 2]
    (cut,) = model.generate_until(requests((prompt, options | {"until": [stop]})), disable_tqdm=True)
    assert cut == plain[: plain.index(stop)]


def test_options_that_are_not_known(model: Any) -> None:
    with pytest.raises(RequestError, match="'repetition_penalty' of the task"):
        model.generate_until(requests(("The", {"until": [], "repetition_penalty": 2.0})), disable_tqdm=True)


def test_one_bos_before_a_chat(model: Any, runtime: DashRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    """A template writes it, and the tokenizer would add another one."""
    begins, encode = runtime.text.tokenizer.token_to_id("<|im_start|>"), runtime.text.encode

    def with_bos(text: str, *, special: bool = True, **options: Any) -> list[int]:
        return [begins] * special + encode(text, special=False, **options)

    monkeypatch.setattr(model.runtime.text, "encode", with_bos)
    chat = model.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert model.tok_encode(chat) == encode(chat, special=False)
    assert model.tok_encode("Hi") == [begins, *encode("Hi", special=False)]


def test_arguments(tiny_root: Path) -> None:
    from examples.lm_eval_harness import DashLM

    where = {"bundle": str(tiny_root), "target": "cpu-fp32"}
    with pytest.raises(RequestError, match="no model argument 'bugdet'"):
        DashLM(**where, bugdet=0.9)
    with pytest.raises(RequestError, match="not a number"):
        DashLM(**where, policy="token", budget="much")
    with pytest.raises(PolicyError, match="no policy kind"):
        DashLM(**where, policy="magic")
    assert DashLM(**where).session().score([1, 2, 3]).actions.sum() == 0


def test_an_evaluation(model: Any, runtime: DashRuntime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval's own multiple choice gives the accuracies that ours gives."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    asked = [
        Question(1, "The layers of a decoder", ("are not equally needed", "hardly", "at all"), 0),
        Question(2, "Some of them", ("hardly at all", "are needed"), 1),
        Question(3, "And", ("equally", "not a decoder of layers"), 1),
    ]
    lines = [{"query": q.query, "choices": list(q.choices), "gold": q.gold} for q in asked]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    task = {
        "task": "own",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "own.jsonl")}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    results = lm_eval.simple_evaluate(model=model, tasks=[task], bootstrap_iters=0)["results"]["own"]
    compared = candidates(runtime, (Setting("dense"), SETTING))
    ours = score(ChoiceScore(runtime, asked, "q"), compared)[1].figures
    assert results["acc,none"] == pytest.approx(ours["accuracy"].value)
    assert results["acc_norm,none"] == pytest.approx(ours["normalised"].value)
