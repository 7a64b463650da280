"""Tasks of EleutherAI's lm-eval (extra `eval`), run under every candidate; a candidate as lm-eval's model.

lm-eval reads the task, builds the requests and scores the answers. Made here of its samples: intervals, and flips
(items that dense answers right and a candidate wrong, or the reverse; arXiv 2407.09141).
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partialmethod
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from dash_export.core.sampling import Sampling
from dash_export.core.units import DENSE_POSITIONS, Actions
from dash_export.errors import RequestError
from dash_export.files.artifacts import Progress, no_progress
from dash_export.measure.candidates import Candidate
from dash_export.measure.intervals import Floats, Interval, interval
from dash_export.measure.score import Figures, Result

MAX_NEW_TOKENS = 256
"""Most tokens of an answer, where the task names no number."""
FEWSHOT_SEED = 1234
"""lm-eval's own: every candidate gets the same examples."""
UNSAFE = "HF_ALLOW_CODE_EVAL"
"""Environment variable that permits tasks which run what the model writes, as Hugging Face's `evaluate` names it."""
_OPTIONS = {"max_gen_toks", "temperature", "top_k", "top_p", "until", "do_sample"}


class DashLM(TemplateLM):  # type: ignore[misc]
    """A candidate as lm-eval's model. Contexts are dense, like prompts; what follows is under the setting. `actions`
    collects the skip maps of the tokens that might skip.
    """

    def __init__(self, candidate: Candidate, progress: Progress = no_progress) -> None:
        super().__init__()
        self.candidate, self.progress, self.text = candidate, progress, candidate.runtime.text
        model = candidate.runtime.engines.model
        self.max_length, self.actions = model.max_positions, [np.zeros((0, model.num_layers), np.int8)]

    @property
    def eot_token_id(self) -> int:
        """Token that stands for an empty context: the model's BOS, or else its end of text."""
        bos, eos = self.text.bos_id, self.text.eos_ids
        if bos is None and not eos:
            raise RequestError("The model has neither a BOS nor an end-of-text token, which an empty context needs.")
        return min(eos) if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self.candidate.runtime.bundle.manifest.model.name

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        if self.text.template is None:
            raise RequestError("This model has no chat template: run lm-eval without apply_chat_template.")
        return self.text.template.render(chat_history, add_generation_prompt)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return token ids. What begins a text is not put before a rendered chat, which has it already."""
        plain, begins = self.text.encode(string, special=False), self.text.encode("")
        return plain if add_special_tokens is False or plain[: len(begins)] == begins else self.text.encode(string)

    loglikelihood = partialmethod(TemplateLM.loglikelihood, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        return [self._score(context, continuation) for _, context, continuation in self._counted(requests)]

    def loglikelihood_rolling(self, requests: Sequence[Any], **_: Any) -> list[float]:
        """Score whole documents in windows of the model's context, each with a dense prefix of two tokens."""
        totals = []
        for request in self._counted(requests):
            ids = self.tok_encode(request.args[0])
            # A window's own first token is context: one more position.
            windows = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length - 1, context_len=1)
            totals.append(sum(self._score(*make_disjoint_window(window))[0] for window in windows))
        return totals

    def generate_until(self, requests: Sequence[Any], **_: Any) -> list[str]:
        return [self._answer(*request.args) for request in self._counted(requests)]

    def _counted(self, requests: Sequence[Any]) -> Iterator[Any]:
        for done, request in enumerate(requests, 1):
            yield request
            self.progress(self.candidate.label, done, len(requests))

    def _score(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        """Return the log-likelihood of the continuation, and whether greedy decode would write it."""
        if not continuation:
            return 0.0, True
        # What does not fit is cut from the left, as lm-eval's own models do.
        ids = np.array((context + continuation)[-self.max_length :], np.int64)
        dense = max(1, len(ids) - len(continuation))
        found = self.candidate.session().score(ids, prefix=dense)
        self.actions.append(found.actions[max(dense, DENSE_POSITIONS) : -1])
        return float(found.log_likelihoods[dense - 1 :].sum(dtype=np.float64)), bool(found.greedy[dense - 1 :].all())

    def _answer(self, context: str, options: Mapping[str, Any]) -> str:
        wanted = normalize_gen_kwargs(dict(options), MAX_NEW_TOKENS)
        if unknown := sorted(wanted.keys() - _OPTIONS):
            raise RequestError(f"{unknown[0]!r} of the task's generation_kwargs is not known: {sorted(_OPTIONS)} are.")
        chances = {name: wanted[name] for name in ("temperature", "top_k", "top_p") if wanted.get(name)}
        room, stop = wanted["max_gen_toks"], tuple(filter(None, wanted["until"]))
        ids = self.tok_encode(context)[min(-1, room - self.max_length) :] or [self.prefix_token_id]
        made = self.candidate.session().generate(ids, room, Sampling(stop=stop, **chances))
        self.actions.append(made.actions[1:])  # the prompt predicts the first one
        return made.text


def load_tasks(names: Iterable[str], include_path: Path | None, limit: int) -> dict[str, Any]:
    """Return lm-eval's tasks by name; a group or tag is all of its tasks. `include_path`: a folder of YAML files beside
    lm-eval's own. The requests of the first `limit` items are built once, so that a fault of a task or its data is told
    before anything is measured. Raises RequestError for it, and for an unknown name.
    """
    names = list(names)
    manager = TaskManager(include_path=include_path, include_defaults=False)
    if not {*names} <= {*manager.all_tasks}:  # 10 s: it reads 14,000 files
        manager = TaskManager(include_path=include_path)
    if unknown := [name for name in names if name not in manager.all_tasks]:
        raise RequestError(
            f"lm-eval has no task {unknown[0]!r}. `lm_eval ls tasks` lists its own; --include-path names a folder with "
            "your own, as YAML."
        )
    tasks: dict[str, Any] = {}
    for name in names:
        try:
            tasks |= (loaded := manager.load(name)["tasks"])
            for task in loaded.values():
                task.build_all_requests(limit=limit)
        except Exception as error:  # whatever the task's YAML, its data or its functions raise
            said = " ".join(f"{type(error).__name__}: {error}".split())
            raise RequestError(
                f"lm-eval cannot load the task {name!r} ({said:.300}). Check its YAML and its data. Without a network "
                "data is read by path: docs/evaluation.md."
            ) from error
    for name, task in tasks.items():
        if getattr(task, "UNSAFE_CODE", False) and os.environ.get(UNSAFE) != "1":
            raise RequestError(f"The task {name!r} runs code that the model writes. {UNSAFE}=1 permits it.")
    return tasks


def run_task(
    name: str, task: Any, candidates: Sequence[Candidate], limit: int, progress: Progress = no_progress
) -> list[Result]:
    """Return one result per candidate, the first of which is dense, over the first `limit` items. Figures: lm-eval's
    metrics, first those that are means over items, with an interval. Of the last of these that is right or wrong per
    item also `lost` (dense right, candidate wrong) and `won`, the reverse.
    """
    results, dense, count = list[Result](), None, len(candidates)
    for index, candidate in enumerate(candidates):

        def told(label: str, done: int, total: int, before: int = index) -> None:
            progress(f"{name}: {label}", before * total + done, count * total)

        model = DashLM(candidate, told)
        task.set_fewshot_seed(FEWSHOT_SEED)
        found = lm_eval.evaluate(
            model,
            {"tasks": {name: task}},
            limit=limit,
            bootstrap_iters=0,
            confirm_run_unsafe_code=os.environ.get(UNSAFE) == "1",
        )
        figures, right = _figures(found["results"][name], found["samples"][name])
        dense = right if dense is None else dense
        if right is not None and dense is not None:
            figures |= {"lost": interval(dense > right), "won": interval(right > dense)}
        taken: Actions = np.concatenate(model.actions)
        items = found["n-samples"][name]["effective"]
        results.append(Result(candidate.build, candidate.setting, *candidate.taken(taken), items, figures))
    return results


def _figures(metrics: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> tuple[Figures, Floats | None]:
    """Return the figures of lm-eval's metrics, and the items' values of the last one that is 0 or 1 for each."""
    means, others, right = Figures(), Figures(), None
    for key, value in metrics.items():
        metric, _, chosen = key.partition(",")
        if not chosen or metric.endswith("_stderr"):
            continue
        named = metric if chosen == "none" else f"{metric}_{chosen}"
        others[named] = Interval(value, value, value)
        each = [item[metric] for item in samples if item["filter"] == chosen]
        if all(isinstance(one, (bool, int, float, np.number)) for one in each):
            own = np.array(each, np.float64)
            if np.isclose(own.mean(), value):
                means[named] = interval(own)
                del others[named]
                right = own if np.isin(own, (0, 1)).all() else right
    return means | others, right
