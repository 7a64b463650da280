"""`DashRuntime`: a bundle's engines, loaded and ready to make sessions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

from dash_export.backends.base import load_backend
from dash_export.backends.host.decode import MAX_SEQUENCES
from dash_export.bundle import hub, signing
from dash_export.bundle.bundle import Bundle
from dash_export.bundle.layout import LOWERED, is_hub_id
from dash_export.bundle.recipe import MAX_THREADS, Dispatch
from dash_export.bundle.records import Build
from dash_export.core.advice import drafter_command
from dash_export.core.dial import CostTable, in_mode, recommended_budget
from dash_export.core.drafts import Drafts, no_drafts
from dash_export.core.kinds import Served, SessionRules, Setting, session_rules
from dash_export.core.own_policy import CPU_ONLY, NO_POLICY, OwnRule, Policy
from dash_export.core.rule import Rule
from dash_export.core.sampling import Prompt, Sampling
from dash_export.errors import BackendError, PolicyError, RequestError
from dash_export.files.artifacts import FileRecord
from dash_export.runtime.batch import Batch, refuse_one_text
from dash_export.runtime.encoder import Encoder
from dash_export.runtime.results import MAX_TOKENS, Generation, Response, Score
from dash_export.runtime.session import Session
from dash_export.text.tokenizer import Text

if TYPE_CHECKING:
    from dash_export.backends.base import Started
    from dash_export.backends.cuda.engines import DeviceEngines
    from dash_export.backends.host.decode import EngineSet
    from dash_export.backends.host.encoder_pass import EncoderEngines

DISPATCH_MODES = get_args(Dispatch)


class DashRuntime:
    """Loaded build that serves many sessions. Engines are shared; a session has its own cache, policy and budget."""

    def __init__(self, bundle: Bundle, build: Build, backend: Started, dispatch: str | None = None) -> None:
        """Load all engines; most callers want `load`. Raises PolicyError for a dispatch mode that this build lacks."""
        dispatch = dispatch or build.dispatch
        if dispatch not in DISPATCH_MODES:
            raise PolicyError(f"There is no dispatch mode {dispatch!r:.60}. Known: {', '.join(DISPATCH_MODES)}.")
        cost, dial = in_mode(build.cost, build.dial, dispatch)
        self.bundle, self.build, self.recipe = bundle, replace(build, cost=cost, dial=dial), build.recipe
        self._loaded = backend.load_build(bundle, self.build, dispatch)

    @property
    def engines(self) -> EngineSet | DeviceEngines:
        """Engines of a causal LM. Raises BundleError for an encoder."""
        _ = self.bundle.manifest.decoder
        return cast("EngineSet | DeviceEngines", self._loaded)

    @cached_property
    def text(self) -> Text:
        """Tokenizer and chat template of a causal LM. Raises BundleError for an encoder."""
        _ = self.bundle.manifest.decoder
        return Text(self.bundle.root)

    @classmethod
    def load(
        cls,
        bundle: str | Path,
        target: str | None = None,
        *,
        dispatch: str | None = None,
        threads: int | None = None,
        verify: bool = True,
        trusted_key: str | Path | None = None,
    ) -> DashRuntime:
        """Load a build of a bundle: a folder, or `org/name` of the hub. `target` names the build; without it `cpu`, or
        the only one there is.

        `dispatch` says how the policy of a GPU target is evaluated: `overlapped` on a stream of its own, `device` (in
        one CUDA graph, decisions included) or `sync`; by default as the recipe says, or what `build` found fastest.
        `threads` overrides the recipe's (0: one per physical core). `verify` checks the SHA-256 of every file that is
        loaded, which a key does too. `trusted_key` (by default the environment's DASH_EXPORT_TRUSTED_KEY): the public
        key that must have signed the bundle. Raises BundleError, BackendError, PolicyError or RequestError.
        """
        if threads is not None and not 0 <= threads <= MAX_THREADS:
            raise RequestError(f"threads must be from 0 (one per physical core) to {MAX_THREADS}, not {threads}.")
        key = signing.trusted_key(trusted_key)
        trusted = None if key is None else partial(signing.check_signed, public_key=key)

        def load(opened: Bundle) -> DashRuntime:
            build = opened.load_build(opened.resolve_target(target))
            if build.target.endswith(LOWERED):
                raise opened.not_compiled(build.target)
            if trusted is not None:
                trusted(opened)
            hashes = verify or trusted is not None
            if hashes:
                opened.check_listed(build)
            text = [record for record in opened.manifest.files if not record.name.startswith("onnx/")]
            seal = opened.verify([*text, *loaded_files(opened, build)], hashes=hashes)
            recipe = build.recipe
            backend = load_backend(recipe.backend, recipe.runtime.threads if threads is None else threads)
            runtime = cls(opened, build, backend, dispatch)
            opened.check_same(seal)
            opened.root = opened.root.absolute()  # mixed engines load later, when the working folder may be another
            return runtime

        if is_hub_id(bundle):
            return hub.load_from_hub(Path(bundle).as_posix(), target, trusted, load)
        return load(Bundle.open(bundle))

    @property
    def dispatch(self) -> str:
        """Dispatch mode in use: `overlapped` where `device` was wanted but is not possible."""
        return self._loaded.dispatch

    @property
    def cost(self) -> CostTable:
        """Measured cost table that the decisions use."""
        return self.build.cost

    @property
    def recommended(self) -> Setting:
        """Setting that `run` uses where nothing is asked for: the token policy at the budget that costs 2 % of
        perplexity on the calibration text (0.01 of the cosine for an encoder), or dense, where that budget saves less
        than 5 % of the time or times are of another dispatch. It is not held: the same trade-off skips less of a text
        where skipping costs more.
        """
        measure = self.bundle.manifest.measure
        budget = recommended_budget(self.build.dial, measure) if self._times_hold else None
        return Setting("dense") if budget is None else Setting("token", budget=budget, hold=False)

    # --- sessions

    def session(self, policy: str | None = None, **amounts: Any) -> Session:
        """Begin a new conversation. `policy`: `dense` (the kill switch), `static`, `token`, or `module:Class`, a policy
        of your own; without it the amounts decide, and without amounts it is dense. `amounts`: the fields of `Setting`
        that say how much is skipped. Raises PolicyError.
        """
        return self.session_with(Setting(policy, **amounts))

    def session_with(self, setting: Setting) -> Session:
        """Begin a new conversation, as `session` does, with the arguments in one object."""
        return self._session(self.rules(setting), self._new_drafts(setting))

    def _new_drafts(self, setting: Setting) -> Callable[[], Drafts | None]:
        """Return what makes the drafts of a text. Raises PolicyError for a drafter that this build has not."""
        wanted, costs = setting.draft, self.cost.passes
        trained = self.engines.drafter is not None and wanted in ("auto", "layer")
        looks = wanted in ("auto", "lookup")
        if setting.kind != "dense" or wanted == "off":
            return no_drafts
        if costs is None or (wanted == "layer" and not trained):
            if wanted == "auto":
                return no_drafts
            lacks = f"drafter. {drafter_command(self.bundle.manifest.decoder)}"
            lacks = "times of passes of several rows: build it again." if costs is None else lacks
            raise PolicyError(f"The build for {self.build.target!r} has no {lacks}")
        return partial(Drafts, costs, looks, trained)

    def rules(self, setting: Setting) -> SessionRules:
        """Return the rules of a session with this setting. Raises PolicyError."""
        if setting.budget is not None and not self._times_hold:
            raise PolicyError(
                f"This build's times are of dispatch {self.cost.dispatch!r:.20}, and a budget is of the time. Give "
                f"skipped or max_kl; or build by a recipe with dispatch = {self.dispatch!r}."
            )
        manifest = self.bundle.manifest
        return session_rules(setting, Served(manifest.model, manifest.policy, self.cost, self.build.dial))

    @property
    def _times_hold(self) -> bool:
        return not self.cost.segment_us or self.dispatch == self.cost.dispatch

    def session_under(self, rule: Rule | SessionRules | Policy) -> Session:
        """Begin a new conversation whose actions come from a rule, or from a policy of your own (docs/own-policy.md).
        Raises PolicyError for what is none, and for a policy of your own on a GPU target.
        """
        if isinstance(rule, Policy):
            rule = OwnRule(rule, self.engines.model, self.engines.units, self.cost)
        elif not isinstance(rule, SessionRules) and not hasattr(rule, "asks"):
            raise PolicyError(f"{rule!r:.60} {NO_POLICY}")
        rules = rule if isinstance(rule, SessionRules) else SessionRules(rule)
        if isinstance(rules.calibrated, OwnRule) and not self.engines.shows_states:
            raise PolicyError(CPU_ONLY)
        return self._session(rules, no_drafts)

    def _session(self, rules: SessionRules, new_drafts: Callable[[], Drafts | None]) -> Session:
        known = self.recipe.runtime
        return Session(self.engines, self.text, rules, known.kv_step, known.prefill_chunk, new_drafts)

    def encoder(self, policy: str | None = None, **amounts: Any) -> Encoder:
        """Return the encoder of pictures under a policy, as `session` takes it: `dense`, `static` or `token`, which for
        an encoder decides for a picture, not for a token. Raises PolicyError, and BundleError for a causal LM.
        """
        return self.encoder_with(Setting(policy, **amounts))

    def encoder_with(self, setting: Setting) -> Encoder:
        """Return the encoder as `encoder` does, with the arguments in one object."""
        _ = self.bundle.manifest.encoder
        return Encoder(cast("EncoderEngines", self._loaded), self.bundle.root, self.rules(setting).calibrated)

    def batch(self, size: int = 8, policy: str | None = None, **amounts: Any) -> Batch:
        """Make a batch: at most `size` sequences decoded together, each as in a `session`. Raises PolicyError, and
        BackendError where the engines take fewer (a GPU's: the recipe's `sequences`).
        """
        return self.batch_with(Setting(policy, **amounts), size)

    def batch_with(self, setting: Setting, size: int = 8) -> Batch:
        """Make a batch, as `batch` does, with the arguments in one object."""
        if not 1 <= size <= MAX_SEQUENCES:
            raise RequestError(
                f"size, how many sequences a batch holds, must be from 1 to {MAX_SEQUENCES}, not {size}."
            )
        if size > (most := self.engines.sequences):
            more = "the target 'cpu' takes more" if self.engines.grows else "build by a recipe with more `sequences`"
            raise BackendError(f"The engines for {self.build.target!r} decode {most} together, not {size}: {more}.")
        return Batch(self.engines, self.session_with(setting), size)

    # --- what a new session or batch does, in one call

    def generate(
        self, prompt: Prompt, max_tokens: int | None = MAX_TOKENS, sampling: Sampling | None = None, **session: Any
    ) -> Generation:
        """Return `session(**session).generate(...)`."""
        return self.session(**session).generate(prompt, max_tokens, sampling)

    def chat(
        self,
        messages: Sequence[Mapping[str, str]],
        max_tokens: int | None = MAX_TOKENS,
        sampling: Sampling | None = None,
        **session: Any,
    ) -> Iterator[Response]:
        """Return `session(**session).chat(...)`."""
        return self.session(**session).chat(messages, max_tokens, sampling)

    def score(self, ids: Prompt, prefix: int = 2, **session: Any) -> Score:
        """Return `session(**session).score(...)`."""
        return self.session(**session).score(ids, prefix)

    def generate_batch(
        self,
        prompts: Iterable[Prompt],
        max_tokens: int | None = MAX_TOKENS,
        sampling: Sampling | None = None,
        size: int = 8,
        **session: Any,
    ) -> list[Generation]:
        """Generate an answer to each prompt, with up to `size` prompts decoded together. Raises what `Batch.checked`
        raises before any answer begins, and the error of an answer that fails.
        """
        refuse_one_text(prompts)
        batch = self.batch(size, **session)
        checked = [batch.checked(prompt, max_tokens) for prompt in prompts]
        responses: list[list[Response]] = [[] for _ in checked]
        for index, response in batch.stream(checked, max_tokens, sampling):
            if response.error is not None:
                raise response.error
            responses[index].append(response)
        return [Generation.gathered(each) for each in responses]


def loaded_files(bundle: Bundle, build: Build) -> list[FileRecord]:
    """Return the files that a build's engines are loaded from: its own files, or the portable graphs."""
    if build.files:
        return list(build.files)
    return [record for record in bundle.manifest.files if record.name.startswith("onnx/")]
