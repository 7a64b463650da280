"""Pictures or texts in, vectors out: an encoder under a policy by which each leaves at an exit, or at the end."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dash_export.bundle.layout import PREPROCESSOR
from dash_export.core.facts import EncoderFacts, TextFacts
from dash_export.core.own_policy import OwnRule
from dash_export.core.rule import DENSE, DecisionRule, ForcedRule, Rule
from dash_export.core.units import Damages, layer_actions
from dash_export.errors import PolicyError, RequestError

if TYPE_CHECKING:
    from dash_export.backends.host.encoder_pass import EncoderEngines

Floats = npt.NDArray[np.float32]
Groups = list[tuple[npt.NDArray[np.intp], npt.NDArray[Any]]]
"""(places, prepared inputs) of those that are computed together."""
MOST_LABEL = 200
"""Characters of a class's name that are kept."""


@dataclass(frozen=True)
class Encoded:
    """Results of n pictures or texts. `pooled` float32 [n, hidden]: a vector for each; `states` float32 [n, tokens,
    hidden]: special tokens, then patches row by row, or the tokens of texts of one length; by the policy `dense` only:
    an exit knows the pooled vector, not these;
    `actions` int8 [n, layers] (0 run, 1 skip); `guarded` bool [n]: foreign to what the policy was trained on, so every
    layer ran; `probabilities` float32 [n, classes] and the `classes`' names, where the model has a classifier; `damage`
    float32 [n, units], the policy's output, infinite where guarded and 0 behind the exit that a picture took; `seconds`
    that they took, without reading the pictures or texts.
    """

    pooled: Floats
    states: Floats | None
    actions: npt.NDArray[np.int8]
    guarded: npt.NDArray[np.bool_]
    damage: Floats
    seconds: float
    probabilities: Floats | None = None
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.pooled)


class Encoder:
    """Encoder made by `DashRuntime.encoder()`; threads may share it."""

    def __init__(self, engines: EncoderEngines, root: Path, rule: Rule) -> None:
        """Prepare an encoder under a rule. Raises PolicyError for a policy of the user's."""
        if isinstance(rule, OwnRule):
            raise PolicyError("A policy of your own decides about tokens: an encoder takes dense, static and token.")
        self.engines, self.rule, self._root = engines, rule, root

    def under(self, rule: Rule) -> Encoder:
        """Return an encoder of the same engines under another rule."""
        return Encoder(self.engines, self._root, rule)

    @cached_property
    def processor(self) -> Any:
        """Preparation of pictures, as the model's folder describes it, or of texts."""
        return _PREPARES[self.engines.model.takes](self._root, self.engines.model)

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, by the bundle's config.json; their numbers where it has none."""
        named = json.loads((self._root / "config.json").read_text(encoding="utf-8")).get("id2label")
        names = named if isinstance(named, dict) else {}
        count = self.engines.model.labels
        return tuple(str(names.get(str(place), place))[:MOST_LABEL] for place in range(count))

    def __call__(self, inputs: Any) -> Encoded:
        """Encode a picture or a sequence of them as one batch: paths, bytes, `data:` URLs, arrays [height, width, 3],
        or PIL images; for a text encoder a text or several. Raises RequestError for what is none.
        """
        many = inputs if isinstance(inputs, Sequence) and not isinstance(inputs, (str, bytes)) else [inputs]
        if not many:
            raise RequestError(f"There are no {self.engines.model.takes}: give at least one.")
        return self._encode(self.processor.groups(many))

    def _encode(self, groups: Groups) -> Encoded:
        return in_order([places for places, _ in groups], [self.encode(array) for _, array in groups])

    def encode(self, array: npt.NDArray[Any]) -> Encoded:
        """Encode prepared pictures, [n, 3, height, width] float32, or texts of one length, token ids [n, length].
        Raises RequestError for another shape, for numbers that are not finite and ids that do not exist.
        """
        if fault := self.engines.model.input_fault(array):
            raise RequestError(fault)
        began = time.perf_counter()
        kind = np.float32 if array.dtype.kind == "f" else np.int64
        found = self.engines.encode(np.ascontiguousarray(array, kind), self._leaves, self.rule.asks)
        seconds = time.perf_counter() - began
        probabilities = None
        if found.logits is not None:
            raised = np.exp(found.logits - found.logits.max(axis=1, keepdims=True))
            probabilities = raised / raised.sum(axis=1, keepdims=True)
        return Encoded(
            found.pooled,
            found.states if self.rule is DENSE else None,
            layer_actions(found.skipped, self.engines.units, self.engines.model.num_layers),
            np.asarray(np.isinf(found.damage).any(axis=0)),
            np.ascontiguousarray(found.damage.T, np.float32),
            seconds,
            probabilities,
            self.classes if probabilities is not None else (),
        )

    def stream(self, inputs: Iterable[Any], size: int = 1) -> Iterator[Encoded]:
        """Yield the results of pictures or texts as they come, `size` at a time. The next ones are read and prepared
        while these are computed.
        """
        if size < 1:
            raise RequestError(f"size, the inputs of a batch, must be at least 1, not {size}.")
        coming = iter(inputs)

        def prepared() -> Groups | None:
            some = list(islice(coming, size))
            return self.processor.groups(some) if some else None

        with ThreadPoolExecutor(1) as beside:
            following = beside.submit(prepared)
            while (groups := following.result()) is not None:
                following = beside.submit(prepared)
                yield self._encode(groups)

    def _leaves(self, unit: int, damage: Damages) -> npt.NDArray[np.bool_]:
        assert isinstance(self.rule, (DecisionRule, ForcedRule))
        return self.rule.leaves(unit, damage)


def in_order(places: Sequence[Sequence[int] | npt.NDArray[np.intp]], results: Sequence[Encoded]) -> Encoded:
    """Return the results of groups of inputs as one, in the order of their `places`, one sequence for each group;
    `states` only where there is one group.
    """
    if len(results) == 1:
        return results[0]
    order, first = np.argsort(np.concatenate(places)), results[0]
    names = [name for name in _JOINED if getattr(first, name) is not None]
    arrays: dict[str, Any] = {name: np.concatenate([getattr(one, name) for one in results])[order] for name in names}
    return Encoded(**arrays, states=None, seconds=sum(one.seconds for one in results), classes=first.classes)


_JOINED = ("pooled", "actions", "guarded", "damage", "probabilities")


def _pictures(root: Path, _model: EncoderFacts) -> Any:
    from dash_export.images.processor import ImageProcessor

    path = root / PREPROCESSOR
    return ImageProcessor.parse(path.read_text(encoding="utf-8"), str(path))


def _texts(root: Path, model: EncoderFacts) -> Any:
    from dash_export.text.tokenizer import TextIds

    assert isinstance(model, TextFacts)
    return TextIds(root, model.max_positions)


_PREPARES: dict[str, Callable[[Path, EncoderFacts], Any]] = {"pictures": _pictures, "texts": _texts}
"""By what the model takes: what makes `groups` of its inputs."""
