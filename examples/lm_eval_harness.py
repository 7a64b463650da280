"""Score a bundle on the tasks of EleutherAI's lm-eval, under any policy.

    pip install -e '.[cpu]' lm-eval
    python examples/lm_eval_harness.py --model dash \\
        --model_args bundle=my.dash,policy=token,budget=0.85 --tasks arc_easy,piqa --limit 200

lm-eval (0.4.9 and later) finds no models by entry point: this script registers the class `dash` and runs lm-eval's own
command line. From Python: import it, then `lm_eval.simple_evaluate(model="dash", model_args=...)`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from dash_export.core.kinds import Setting
from dash_export.errors import RequestError
from dash_export.runtime import DashRuntime, Sampling, Session

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

MAX_NEW_TOKENS = 256
_KNOWN = {"max_gen_toks", "temperature", "top_k", "top_p", "until", "do_sample"}


@register_model("dash")
class DashLM(TemplateLM):  # type: ignore[misc]
    """A built bundle under one setting. Contexts are dense like prompts; continuations are under the policy."""

    def __init__(
        self,
        bundle: str,
        target: str | None = None,
        threads: int | None = None,
        batch_size: int | str | None = None,  # noqa: ARG002
        max_batch_size: int | None = None,  # noqa: ARG002
        device: str | None = None,  # noqa: ARG002
        **setting: Any,
    ) -> None:
        """`setting`: what `DashRuntime.session` takes (policy, budget, skipped, trade_off, max_kl, max_layers).

        lm-eval always passes batch size and device: the runtime works one sequence at a time where its target is.
        Raises RequestError for another argument, PolicyError for a setting the bundle cannot give.
        """
        super().__init__()
        self._wanted = _setting(setting)
        self.runtime = DashRuntime.load(bundle, target, threads=threads)
        self.session()  # now, and not when the tasks are loaded
        self.max_length = self.runtime.engines.model.max_positions

    def session(self) -> Session:
        """An empty one."""
        return self.runtime.session_with(self._wanted)

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token."""
        eos = self.runtime.text.eos_ids
        if not eos:
            raise RequestError("The model names no end-of-text token, which an empty context needs.")
        return min(eos)

    @property
    def prefix_token_id(self) -> int:
        """What stands for an empty context: the model's BOS, where it has one."""
        bos = self.runtime.text.bos_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self.runtime.bundle.manifest.model.name

    def chat_template(self, chat_template: bool | str = False) -> str | None:  # noqa: ARG002
        """A fingerprint for lm-eval's request cache: the bundle's own template is the one there is."""
        path = self.runtime.bundle.root / "chat_template.jinja"
        return path.read_text(encoding="utf-8") if path.is_file() else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        template = self.runtime.text.template
        if template is None:
            raise RequestError("This model has no chat template: run lm-eval without --apply_chat_template.")
        return template.render(chat_history, add_generation_prompt)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:  # noqa: ARG002
        """Token ids; what begins a text is not put before a rendered chat, which has it."""
        encode = self.runtime.text.encode
        plain, begins = encode(string, special=False), encode("")
        if add_special_tokens is False or plain[: len(begins)] == begins:
            return plain
        return encode(string)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,  # noqa: ARG002
    ) -> list[tuple[float, bool]]:
        answers = []
        for key, context, continuation in tqdm(requests, disable=disable_tqdm, desc="loglikelihood"):
            answer = self._score(context, continuation)
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, answer)
            answers.append(answer)
        return answers

    def _score(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        """Log-likelihood of the continuation, and whether greedy decode would write it."""
        if not continuation:
            return 0.0, True
        # What does not fit is cut from the left, as lm-eval's own models do.
        ids = np.array((context + continuation)[-self.max_length :], np.int64)
        count = min(len(continuation), len(ids) - 1)
        score = self.session().score(ids, prefix=len(ids) - count)
        return float(score.log_likelihoods[-count:].sum(dtype=np.float64)), bool(score.greedy[-count:].all())

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Whole documents in windows of the model's context; all but a window's first two tokens under the policy."""
        totals = []
        for request in tqdm(requests, disable=disable_tqdm, desc="loglikelihood_rolling"):
            (text,) = request.args
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                # A window's own first token is context: one more position.
                max_seq_len=self.max_length - 1,
                context_len=1,
            )
            total = sum(self._score(*make_disjoint_window(window))[0] for window in windows)
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
            totals.append(float(total))
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Decoded under the policy until a stop string, the end of the text or the wanted length."""
        answers = []
        for request in tqdm(requests, disable=disable_tqdm, desc="generate_until"):
            context, options = request.args
            answer = self._generate(context, options)
            self.cache_hook.add_partial("generate_until", request.args, answer)
            answers.append(answer)
        return answers

    def _generate(self, context: str, options: Mapping[str, Any]) -> str:
        wanted = dict(normalize_gen_kwargs(dict(options), MAX_NEW_TOKENS))
        if unknown := sorted(wanted.keys() - _KNOWN):
            raise RequestError(f"{unknown[0]!r} of the task's generation options is not known here.")
        room = int(wanted["max_gen_toks"])
        if not 0 < room < self.max_length:
            raise RequestError(f"{room} new tokens do not fit the model's context of {self.max_length}.")
        sampling = Sampling(
            temperature=float(wanted.get("temperature") or 0.0),
            top_k=int(wanted.get("top_k") or 0),
            top_p=float(wanted.get("top_p") or 1.0),
            stop=tuple(stop for stop in handle_stop_sequences(wanted.get("until"), eos=None) if stop),
        )
        ids = self.tok_encode(context)[-(self.max_length - room) :] or [self.prefix_token_id]
        return self.session().generate(ids, room, sampling).text


def _setting(given: Mapping[str, Any]) -> Setting:
    """lm-eval's argument strings -> a Setting. Raises RequestError for a name that is none of its amounts."""
    kinds: dict[str, type] = dict.fromkeys(("trade_off", "budget", "skipped", "max_kl"), float)
    kinds |= {"policy": str, "max_layers": int}
    unknown = sorted(set(given) - set(kinds))
    if unknown:
        raise RequestError(f"There is no model argument {unknown[0]!r}. Known: bundle, target, {', '.join(kinds)}.")
    try:
        return Setting(**{name: kinds[name](value) for name, value in given.items()})
    except (TypeError, ValueError) as error:
        raise RequestError(f"A model argument is not a number: {error}.") from error


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
