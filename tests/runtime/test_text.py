"""Text in and out: incremental decoding, stop strings, and chat templates that mean no good."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.decoders import ByteFallback, Fuse, Sequence
from tokenizers.models import BPE

from dash_export.bundle import TEXT_FILES
from dash_export.errors import BundleError, DashError, RequestError
from dash_export.runtime import text as text_module
from dash_export.runtime.text import ChatTemplate, Text, TextStream
from tests.models.helpers import tiny_tokenizer
from tests.tiny import CHAT_TEMPLATE

MESSAGES = [{"role": "user", "content": "Hi"}]
TOKENIZER = tiny_tokenizer()


def stream(text: str, *stop: str) -> tuple[list[str], bool]:
    """The pieces of a text whose tokens are single bytes, and whether a stop string ended it."""
    pieces, out = [], TextStream(TOKENIZER, stop)
    for token in TOKENIZER.encode(text).ids:
        pieces.append(out.push(token))
        if out.stopped:
            return pieces, True
    return [*pieces, out.finish()], False


@given(st.text(max_size=60))
def test_pieces_make_the_text(text: str) -> None:
    expected = TOKENIZER.decode(TOKENIZER.encode(text).ids)
    pieces, stopped = stream(text)
    assert "".join(pieces) == expected
    assert not stopped


def test_unicode_is_never_cut() -> None:
    """Four bytes, four tokens, one piece."""
    pieces, _ = stream("a☕é🙂")
    assert [piece for piece in pieces if piece] == ["a", "☕", "é", "🙂"]


def test_bytes_that_are_no_text_end_no_answer() -> None:
    """As SentencePiece writes them: a byte that stands alone, then one that nothing follows."""
    tokenizer = Tokenizer(
        BPE({"<0x0A>": 0, "<0xF0>": 1, "a": 2, "<unk>": 3}, [], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.decoder = Sequence([ByteFallback(), Fuse()])
    out = TextStream(tokenizer)
    pieces = [out.push(token) for token in (2, 0, 1, 2, 2, 0, 2)]
    assert "".join([*pieces, out.finish()]) == "a\n\ufffdaa\na"


@given(st.text("ab<>é", max_size=30), st.text("ab<>é", min_size=1, max_size=5))
def test_stop_string_over_tokens(text: str, stop: str) -> None:
    pieces, stopped = stream(text, stop)
    assert stopped == (stop in text)
    assert "".join(pieces) == text.partition(stop)[0]


def test_what_may_begin_a_stop_string_is_held_back() -> None:
    out = TextStream(TOKENIZER, ("<end>",))
    pieces = [out.push(token) for token in TOKENIZER.encode("x<en!<end>").ids]
    assert pieces[:5] == ["x", "", "", "", "<en!"]
    assert out.stopped


def test_the_earliest_of_two_stop_strings_wins() -> None:
    assert stream("one two three", "three", "two") == (["o", "n", "e", " ", "", "", ""], True)


def test_template_renders_as_written() -> None:
    rendered = ChatTemplate(CHAT_TEMPLATE, {}).render(MESSAGES)
    assert rendered == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_template_may_use_what_templates_use() -> None:
    source = (
        "{{ messages[0].content.replace('H', 'h') ~ '!' }}{{ ['a', 'b'] | join('-') }}{{ '-'.join(['c', 'd']) }}"
        "{{ 'x' + 'y' }}{{ 3 % 2 }}{{ 2 * 3 }}{{ {'a': [1]} | tojson }}{{ 'Hii' | replace('i', 'o', 1) | upper }}"
    )
    assert ChatTemplate(source, {}).render(MESSAGES) == 'hi!a-bc-dxy16{"a": [1]}HOI'
    assert len(ChatTemplate("{{ [1] | tojson(10000000000) }}", {}).render(MESSAGES)) < 100


def doubled(expression: str) -> str:
    """A template that puts the expression's value in n.x, 60 times."""
    return "{% set n = namespace(x='aa') %}{% for i in range(60) %}{% set n.x = " + expression + " %}{% endfor %}"


def many(use: str, count: int = 2000) -> str:
    """A template that uses one text of five million characters very often."""
    return (
        "{% set n = namespace(s='aaaaaaaaaa') %}{% for i in range(19) %}{% set n.s = n.s ~ n.s %}{% endfor %}"
        + use.replace("MANY", "[" + "n.s, " * count + "]")
    )


HOSTILE = {
    "many-shown": many("{{ MANY }}"),
    "many-added": many("{% set n.x = [] %}{% for i in range(2000) %}{% set n.x = n.x + [n.s] %}{% endfor %}{{ n.x }}"),
    "namespaces": doubled("namespace(a=n.x, b=n.x)") + "{{ n.x }}",
    "namespaces-filled": "{% set n = namespace(x='aa') %}{% for i in range(60) %}{% set m = namespace() %}"
    "{% set m.a = n.x %}{% set m.b = n.x %}{% set n.x = m %}{% endfor %}{{ n.x }}",
    "views": doubled("dict(a=n.x, b=n.x).items()") + "{{ n.x }}",
    "escaped": "{% set n = namespace(x='<') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x | forceescape %}"
    "{% endfor %}",
    "class": "{{ ''.__class__.__mro__ }}",
    "subclasses": "{{ ().__class__.__base__.__subclasses__() }}",
    "environment": "{{ self._TemplateReference__context.environment }}",
    "import": "{% import '/etc/passwd' as x %}",
    "include": "{% include '/etc/passwd' %}",
    "repeat": "{{ 'a' * 10**10 }}",
    "repeat-number-first": "{{ 9999999999 * 'a' }}",
    "repeat-list": "{{ [0] * 10000000000 }}",
    "power": "{{ 9 ** 999999999 }}",
    "long": "{% for a in range(99999) %}{% for b in range(99999) %}{{ 'aaaaaaaaaaaaaaa' }}{% endfor %}{% endfor %}",
    "huge-range": "{% for a in range(10**12) %}a{% endfor %}",
    "mutate": "{{ messages.append(1) }}",
    "pad": "{{ '%9999999999d' % 1 }}",
    "center": "{{ 'a'.center(10000000000) }}",
    "center-filter": "{{ 'a' | center(10000000000) }}",
    "indent-filter": "{{ 'a\\nb' | indent(10000000000) }}",
    "double": doubled("n.x ~ n.x"),
    "double-plus": doubled("n.x + n.x"),
    "double-list": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "double-block": "{% set n = namespace(x='aa') %}{% for i in range(60) %}{% set y %}{{ n.x }}{{ n.x }}{% endset %}"
    "{% set n.x = y %}{% endfor %}",
    "double-replace": doubled("n.x.replace('a', n.x)"),
    "double-filter": doubled("n.x | replace('a', n.x)"),
    "replace-nothing": doubled("n.x.replace('', n.x)"),
    "double-join": doubled("[n.x, n.x] | join(n.x)"),
    "shared-list": doubled("[n.x, n.x]"),
    "shared-tuple": doubled("(n.x, n.x)"),
    "shared-dict": doubled("{'a': n.x, 'b': n.x}"),
    "shared-call": doubled("dict(a=n.x, b=n.x)"),
    "double-sum": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] | sum(start=[]) %}"
    "{% endfor %}",
    "double-json": doubled("n.x | tojson"),
    "double-repr": doubled("n.x | pprint"),
    "urlize": doubled("n.x | urlize(target=n.x)"),
    "square": "{% set n = namespace(x=9) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "bytes": "{{ 'a'.encode() * 10000000000 }}",
    "int-bytes": "{{ (1).to_bytes(10000000000, 'big') }}",
    "nested-blocks": "{% for a in [1] %}" * 25 + "x" + "{% endfor %}" * 25,
    "long-number": "{{ " + "1" * 5000 + " }}",
    "lipsum": "{{ lipsum(n=1000000) }}",
    "undefined": "{{ messages[9].role.text }}",
    "raise": "{{ raise_exception('no system role') }}",
    "divide": "{{ 1 / 0 }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_template(name: str) -> None:
    """Refused by an error a user can read, with little time and memory spent; nothing of Python leaks."""
    with pytest.raises(DashError, match="template") as caught:
        ChatTemplate(HOSTILE[name], {}).render(MESSAGES)
    assert len(str(caught.value)) < 500


def test_what_templates_really_use() -> None:
    """Containers, sums, unpacking and the marks that training templates set around an answer."""
    source = (
        "{% for a, b in [(1, 2), (3, 4)] %}{{ [a, b] | sum }},{% endfor %}"
        "{% set c, d = 5, {'e': [6]} %}{{ c }}{{ d.e[0] }}"
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}{{ [1, 'x'] | tojson }}"
        "{{ dict(a=1).a }}{{ messages[0].items() | list | length }}{{ 70000 * 70000 }}"
    )
    assert ChatTemplate(source, {}).render([{"role": "user", "content": "Hi"}]) == '3,7,56Hi[1, "x"]124900000000'


@pytest.mark.parametrize("source", ["{{ raise_exception.__globals__ }}", "{{ '{0.__class__}'.format(messages) }}"])
def test_unsafe_attribute_is_never_text(source: str) -> None:
    with suppress(RequestError):
        assert ChatTemplate(source, {}).render(MESSAGES) == ""


@pytest.mark.parametrize("source", ["{% for %}", "{{ unclosed", "{% endif %}", "{{ 'x' | no_such_filter }}"])
def test_template_with_wrong_syntax(source: str) -> None:
    with pytest.raises(BundleError, match="template"):
        ChatTemplate(source, {})


@pytest.mark.parametrize(
    "message", [{}, {"role": "user"}, {"role": 1, "content": "x"}, {"role": "user", "content": None}]
)
def test_messages_without_text(message: dict[str, object]) -> None:
    with pytest.raises(RequestError, match="'role' and a 'content'"):
        ChatTemplate(CHAT_TEMPLATE, {}).render([message])  # type: ignore[list-item]


def test_what_is_read_is_what_a_bundle_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    read: set[str] = set()
    monkeypatch.setattr(text_module, "safe_path", lambda folder, name: read.add(name) or folder / name)
    Text(tmp_path)
    assert read == set(TEXT_FILES)


def test_bundle_without_template(tmp_path: Path) -> None:
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(RequestError, match="no chat template"):
        Text(tmp_path).chat(MESSAGES)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_damaged_text_file(name: str, tmp_path: Path) -> None:
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / name).write_text("{ not json")
    with pytest.raises(BundleError, match=name):
        Text(tmp_path)


def test_end_of_turn_ids(tmp_path: Path) -> None:
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|im_end|>"}}')
    assert Text(tmp_path).eos_ids == {258}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert Text(tmp_path).eos_ids == {7, 9}


def test_how_training_batches_were_cut_and_filled_is_no_matter_here(tiny_root: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "config.json"):
        shutil.copy(tiny_root / name, tmp_path)
    plain = Text(tmp_path).encode("One day the ships sailed to port.")
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    data["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    data["padding"] = {
        "strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 1, "pad_type_id": 0,
        "pad_token": "x",
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    assert Text(tmp_path).encode("One day the ships sailed to port.") == plain


def test_files_that_are_no_text_or_lie_elsewhere(tiny_root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    folder.mkdir()
    shutil.copy(tiny_root / "tokenizer.json", folder)
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(BundleError, match="cannot be read"):
        Text(folder)
    (folder / "chat_template.jinja").unlink()
    (tmp_path / "secret").write_text("mine")
    (folder / "chat_template.jinja").symlink_to(tmp_path / "secret")
    with pytest.raises(BundleError):
        Text(folder)
