"""Answers in a grammar: where they may end."""

import json
import re
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from tokenizers import Tokenizer

from dash_export import DashRuntime
from dash_export.errors import RequestError
from dash_export.text import guidance
from dash_export.text.guidance import Guide, Guides, _without_gaps, json_grammar, regex_grammar
from dash_export.text.tokenizer import Text
from tests.models.helpers import tiny_tokenizer


@pytest.mark.parametrize("regex", ["a/b", "a\\nb", "[/]+", "\\d{2}", "(?:x|y)"])
def test_a_regular_expression_stays_one(regex: str, runtime: DashRuntime) -> None:
    """Whatever it has that ends one in a grammar."""
    guide, made, logits = runtime.text.guides.guide(regex_grammar(regex)), list[int](), np.zeros(300, np.float32)
    ended = False
    while not ended and len(made) < 9:
        allowed = np.flatnonzero(np.isfinite(guide.allowed(logits)))
        made.append(int(allowed[0]))
        ended = guide.take(made[-1])
    assert re.match(regex, runtime.text.decode(made))


@pytest.mark.parametrize("end", [258, 280])
@pytest.mark.parametrize("others", [[], [257]])
def test_an_end_beyond_a_gap_in_the_ids_is_one(end: int, others: list[int], tmp_path: Path) -> None:
    """As Phi-4 mini has it: a vocabulary counts fewer tokens than its largest id says."""
    tokenizer = json.loads(tiny_tokenizer().to_str())
    tokenizer["model"]["vocab"]["<|im_end|>"] = tokenizer["added_tokens"][1]["id"] = end
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [end, *others]}))
    text = Text(tmp_path)
    whole = Tokenizer.from_str(_without_gaps(text.tokenizer)).get_vocab()
    assert sorted(whole.values()) == [*range(end + 1)]
    assert whole.items() >= text.tokenizer.get_vocab().items()
    guide = text.guides.guide(json_grammar({"type": "integer"}))
    (four,) = text.encode("4")
    logits = np.zeros(300, np.float32)
    assert np.isinf(guide.allowed(logits)[end]), "there is no number yet"
    guide.take(four)
    assert np.flatnonzero(np.isfinite(guide.allowed(logits))).tolist().count(end) == 1
    assert guide.take(end)


def test_a_grammar_that_allows_no_token(tmp_path: Path) -> None:
    """Is told in words, not in llguidance's codes: at the beginning, and later."""
    tiny_tokenizer().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 257}')
    nothing = r"start: /[^\x00-\U0010ffff]/"
    with pytest.raises(RequestError, match=r"cannot be read \(by it no token of this model may come next\)\.$"):
        Text(tmp_path).guides.guide(nothing)
    matcher = Mock(is_error=lambda: True, get_error=lambda: "NoExtensionBias\n<non-verbose/>")
    with pytest.raises(RequestError, match=r"cannot go on \(by it no token of this model may come next\)\.$"):
        Guide(matcher).take(5)


def test_the_grammar_used_last_stays_known(runtime: DashRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guidance, "_KEPT", 2)
    guides = Guides(runtime.text.tokenizer, runtime.text.eos_ids)
    for letter in "abac":
        guides.guide(regex_grammar(letter))
    assert [*guides._tried] == [regex_grammar("a"), regex_grammar("c")]
