"""Answers of a given form, and calls of functions: by grammar, so that a random model gives them too."""

import json
from collections.abc import Iterator
from queue import SimpleQueue
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from dash_export import DashRuntime
from dash_export.errors import RequestError
from dash_export.runtime import Response, Sampling
from dash_export.serve.protocol import ChatRequest
from dash_export.serve.running import event
from dash_export.serve.tickets import Request
from dash_export.serve.tools import BEGIN, END, TextBeforeCalls, Tool, calls_grammar, split_calls
from dash_export.text import guidance
from dash_export.text.chat_template import ChatTemplate
from dash_export.text.guidance import Guide, Guides, json_grammar
from dash_export.text.tokenizer import Text
from tests.models.helpers import tiny_tokenizer
from tests.serve.conftest import MakeScheduler
from tests.serve.test_app import MESSAGES

SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["river", "lake"]}, "length": {"type": "integer", "minimum": 0, "maximum": 9999}},
    "required": ["kind", "length"],
    "additionalProperties": False,
}
TOOL: Any = {"type": "function", "function": {"name": "measure", "description": "Measure it.", "parameters": SCHEMA}}
FORMAT = {"type": "json_schema", "json_schema": {"name": "water", "schema": SCHEMA}}
NAMED = {"type": "function", "function": {"name": "measure"}}
OTHER: Any = {"type": "function", "function": {"name": "stop"}}
TEMPLATE = (
    "{% if tools %}{% for tool in tools %}{{ tool | tojson }}{% endfor %}Say <tool_call>{% endif %}"
    "{% for message in messages %}{{ message.role }}: {{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function.arguments | tojson }}</tool_call>"
    "{% endfor %}\n{% endfor %}"
)


def check(text: str) -> None:
    found = json.loads(text)
    assert set(found) == {"kind", "length"}
    assert found["kind"] in ("river", "lake")
    assert 0 <= found["length"] <= 9999


@pytest.mark.parametrize("stream", [False, True])
def test_json_of_a_schema(client: openai.OpenAI, stream: bool) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "max_tokens": 200, "temperature": 2, "seed": 1}
    reply: Any = client.chat.completions.create(response_format=FORMAT, stream=stream, **asked)
    if stream:
        pieces = list(reply)
        check("".join(piece.choices[0].delta.content or "" for piece in pieces))
        assert pieces[-1].choices[0].finish_reason == "stop"
    else:
        check(reply.choices[0].message.content)
        assert reply.choices[0].finish_reason == "stop"


def test_line_ends_of_unicode_in_a_stream() -> None:
    """Some clients end a line at each of them."""
    said = event({"text": "a\u2028b\u0085c"})
    assert said.isascii()
    assert json.loads(said.removeprefix("data: ")) == {"text": "a\u2028b\u0085c"}


def test_a_grammar_that_takes_long_for_each_token(http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends its own answer: all others wait for it."""
    asked = {"messages": MESSAGES, "max_tokens": 40, "response_format": {"type": "json_object"}}
    monkeypatch.setattr(guidance, "GRACE", 0.0)
    monkeypatch.setattr(guidance, "PER_TOKEN", 0.0)
    reply = http.post("/v1/chat/completions", json=asked)
    assert reply.status_code == 400
    assert "takes over 0 ms for each token" in reply.json()["error"]["message"]
    monkeypatch.undo()
    assert http.post("/v1/chat/completions", json=asked).status_code == 200


def test_sessions_and_batches_hold_to_a_grammar_too(runtime: DashRuntime) -> None:
    sampling = Sampling(1.0, seed=5, grammar=json_grammar(SCHEMA))
    alone = runtime.generate("hello", 200, sampling).text
    check(alone)
    found = ["", ""]
    for index, response in runtime.batch(2).stream(["hello", "hello"], 200, sampling):
        found[index] += response.text
    assert found == [alone, alone]
    with pytest.raises(RequestError, match="grammar or schema cannot be read"):
        runtime.generate("hello", 200, Sampling(grammar="start: nothing"))
    with pytest.raises(RequestError, match="over 65536 letters"):
        runtime.generate("hello", 200, Sampling(grammar="start: " + " " * 70_000))


@pytest.fixture
def with_tools(runtime: DashRuntime) -> Iterator[None]:
    """The tiny model's template takes tools."""
    text = runtime.text
    before, text.template = text.template, ChatTemplate(TEMPLATE, {})
    yield
    text.template = before


@pytest.mark.usefixtures("with_tools")
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", NAMED])
def test_a_call_that_is_wanted(client: openai.OpenAI, choice: Any, stream: bool) -> None:
    reply: Any = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=180, seed=1, tools=[TOOL], tool_choice=choice, stream=stream,
        parallel_tool_calls=False,
    )  # fmt: skip
    if stream:
        pieces = list(reply)
        assert not any(piece.choices[0].delta.content for piece in pieces)
        (calls,) = [piece.choices[0].delta.tool_calls for piece in pieces if piece.choices[0].delta.tool_calls]
        assert pieces[-1].choices[0].finish_reason == "tool_calls"
    else:
        calls = reply.choices[0].message.tool_calls
        assert (reply.choices[0].message.content, reply.choices[0].finish_reason) == (None, "tool_calls")
    (call,) = calls
    assert call.function.name == "measure"
    check(call.function.arguments)
    assert call.id.startswith("call_")


@pytest.mark.usefixtures("with_tools")
def test_a_turn_after_a_call(runtime: DashRuntime, client: openai.OpenAI) -> None:
    """The template gets its arguments as they are, not as text."""
    call = {"id": "1", "type": "function", "function": {"name": "measure", "arguments": '{"kind": "lake"}'}}
    messages: Any = [*MESSAGES, {"role": "assistant", "content": None, "tool_calls": [call]},
                     {"role": "tool", "tool_call_id": "1", "content": "12"}]  # fmt: skip
    reply = client.chat.completions.create(model="tiny", messages=messages, max_tokens=2, tools=[TOOL, OTHER])
    text = runtime.text
    assert text.template is not None
    plain = [{"role": "user", "content": "hello there"},
             {"role": "assistant", "content": "", "tool_calls": [{"function": {"arguments": {"kind": "lake"}}}]},
             {"role": "tool", "content": "12"}]  # fmt: skip
    stop = {"function": {"name": "stop", "parameters": {"type": "object", "properties": {}}}}
    shown = text.template.render(plain, tools=[TOOL, OTHER | stop])
    assert '<tool_call>{"kind": "lake"}</tool_call>' in shown
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == len(text.encode(shown, special=False))


def test_a_grammar_that_costs_seconds_is_refused(client: openai.OpenAI, runtime: DashRuntime) -> None:
    """It is tried in a process of its own, where a few hundred letters can take minutes and gigabytes."""
    numbers = {f"n{place}": {"type": "integer", "multipleOf": 190_027 + place} for place in range(100)}
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"properties": numbers}}}
    with pytest.raises(openai.BadRequestError, match="it takes over 1 s or 24 MB"):
        client.chat.completions.create(model="tiny", messages=MESSAGES, response_format=form, timeout=10)
    guides = runtime.text.guides
    guides.guide(json_grammar(SCHEMA))
    guides._tried[json_grammar(SCHEMA | {"title": "dear"})] = 0.2
    form["json_schema"]["schema"] = SCHEMA | {"title": "dear"}
    with pytest.raises(openai.BadRequestError, match="takes too long to be read for 16 answers"):
        client.chat.completions.create(model="tiny", messages=MESSAGES, response_format=form, n=16)
    assert guides._child is not None
    guides._child.process.kill()
    guides._child.process.wait()
    guides.guide(json_grammar(SCHEMA | {"title": "another"}))  # by a new process


def test_what_an_answer_took_goes_with_it(scheduler: MakeScheduler) -> None:
    """Though whoever asked keeps the ticket: a grammar has megabytes that Python does not see."""
    made, told = scheduler(rows=2), SimpleQueue[Response]()
    ticket = made.submit(Request("hello", 200, Sampling(grammar=json_grammar(SCHEMA))), told.put)
    assert ticket.guide is not None
    while told.get(timeout=20).finish_reason is None:
        pass
    made.close()
    assert (ticket.guide, ticket.turn) == (None, None)


def test_answers_that_break_their_grammar_break_no_other(runtime: DashRuntime) -> None:
    """Copies of a matcher share what it has learnt, and there is too much of that here: half of the copies break."""
    text, logits = runtime.text, np.zeros(runtime.text.tokenizer.get_vocab_size(), np.float32)
    grammar = json_grammar({"type": "string", "pattern": r"(?i)^((\p{L}{1,9}|\w{2,7})\s?){1,300}$"})
    first, ids = text.guides.guide(grammar), text.encode('"hello you"')

    def follow(guide: Guide, tokens: list[int]) -> None:
        for token in tokens:
            assert np.isfinite(guide.allowed(logits)[token])
            guide.take(token)

    follow(first, ids[:3])
    for seed in range(60):
        rng, guide = np.random.default_rng(seed), text.guides.guide(grammar)
        for _ in range(60):
            if guide.take(int(rng.choice(np.flatnonzero(np.isfinite(guide.allowed(logits)))))):
                break
    follow(first, ids[3:])
    follow(text.guides.guide(grammar), ids)


def test_a_tokenizer_without_an_end() -> None:
    """llguidance would take its first token for one."""
    with pytest.raises(RequestError, match="own end of a text"):
        Guides(tiny_tokenizer(), [5000]).guide(json_grammar(SCHEMA))


RECURSIVE = {"properties": {"v": {"type": "integer"}, "child": {"$ref": "#"}}, "required": ["v"]}
OLD = {
    "$schema": "http://json-schema.org/draft-07/schema#",
    "$ref": "#/definitions/M",
    "definitions": {"M": {"type": "object", "properties": {"c": {"type": "string"}}, "additionalProperties": False}},
}
DEFINED = {"properties": {"c": {"$ref": "#/$defs/C"}}, "required": ["c"], "additionalProperties": False}


def fits(grammar: str, text: Text, said: str) -> bool:
    """Whether all of it is an answer of the grammar."""
    guide = text.guides.guide(grammar)
    logits = np.zeros(text.tokenizer.get_vocab_size(), np.float32)
    ids = text.encode(said, special=False)
    for token in ids:
        if not np.isfinite(guide.allowed(logits)[token]):
            return False
        guide.take(token)
    return bool(np.isfinite(guide.allowed(logits)[min(text.eos_ids)]))


def test_references_of_tools_are_to_themselves(runtime: DashRuntime) -> None:
    """And not to the grammar that they are put into, or to one another."""
    text = runtime.text
    tools = [
        Tool.model_validate({"type": "function", "function": {"name": name, "parameters": parameters}})
        for name, parameters in (
            ("tree", RECURSIVE | {"additionalProperties": False}),
            ("a", DEFINED | {"$defs": {"C": {"enum": ["x"]}}}),
            ("b", DEFINED | {"$defs": {"C": {"enum": ["y"]}}}),
            ("any", {}),
            ("old", OLD),
        )
    ]
    grammar = calls_grammar(tools, "required", False, marked=False)
    assert grammar is not None
    for name, arguments, expected in (
        ("tree", '{"v": 1, "child": {"v": 2}}', True),
        ("tree", '{"v": 1, "child": {"name": "tree", "arguments": {"v": 2}}}', False),
        ("a", '{"c": "x"}', True),
        ("b", '{"c": "y"}', True),
        ("b", '{"c": "x"}', False),
        ("any", "{}", True),
        ("any", "true", False),
        ("old", '{"c": "z"}', True),
        ("old", '{"c": 1}', False),
    ):
        said = f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'
        assert fits(grammar, text, said) is expected, said
    for wrong in ({"type": "string"}, {"properties": {"a": {"$id": "x"}}}):
        tools[0].function.parameters = wrong
        with pytest.raises(RequestError, match=r"parameters of tree are not of type object, or have an \$id"):
            calls_grammar(tools, "required", False, marked=False)


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory) -> Text:
    """Of a model whose vocabulary has the marks, as Qwen's has."""
    folder = tmp_path_factory.mktemp("marked")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([BEGIN, END])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    return Text(folder)


@pytest.mark.parametrize(
    ("changes", "calls", "answers"),
    [
        ({"tool_choice": "required"}, True, False),
        ({"tool_choice": NAMED}, True, False),
        ({"response_format": FORMAT}, True, True),
        ({"response_format": FORMAT, "tool_choice": "none"}, False, True),
        ({"response_format": FORMAT, "tool_choice": "required"}, True, False),
        ({"response_format": FORMAT, "tools": []}, False, True),
        ({"response_format": {"type": "json_object"}, "tools": []}, False, True),
    ],
)
def test_what_an_answer_may_be(
    changes: dict[str, Any], calls: bool, answers: bool, marked: Text, runtime: DashRuntime
) -> None:
    given = {"messages": MESSAGES, "tools": [TOOL]} | changes
    asked, arguments = ChatRequest.model_validate(given), '{"kind": "lake", "length": 7}'
    call = f'{BEGIN}\n{{"name": "measure", "arguments": {arguments}}}\n{END}'
    for text in (marked, runtime.text):
        grammar = asked.grammar(text.tokenizer)
        assert grammar is not None
        assert fits(grammar, text, call) is calls
        assert fits(grammar, text, arguments) is answers
        assert not fits(grammar, text, "so")
    free = ChatRequest.model_validate(given | {"response_format": None, "tool_choice": "auto"})
    assert free.grammar(marked.tokenizer) is None


def test_a_long_text_of_a_bounded_length(runtime: DashRuntime) -> None:
    """Each place in it costs states of the grammar, which are bounded."""
    schema = {"type": "object", "properties": {"t": {"type": "string", "maxLength": 12_000}}, "required": ["t"]}
    assert fits(json_grammar(schema), runtime.text, json.dumps({"t": "a long text " * 990}))


def test_a_function_that_is_named_is_called_once(runtime: DashRuntime) -> None:
    """Of `required` ones there may be several calls, where calls are parallel."""
    call = f'{BEGIN}\n{{"name": "measure", "arguments": {{"kind": "lake", "length": 7}}}}\n{END}'
    for choice, several in (("required", True), (NAMED, False)):
        request = ChatRequest.model_validate({"messages": MESSAGES, "tools": [TOOL], "tool_choice": choice})
        grammar = calls_grammar(request.tools, request.tool_choice, True, marked=False)
        assert grammar is not None
        assert fits(grammar, runtime.text, call)
        assert fits(grammar, runtime.text, f"{call}\n{call}") is several


def test_calls_among_words() -> None:
    text = 'Well. <tool_call>\n{"name": "a", "arguments": {"x": {"y": 1}}}\n</tool_call> And <tool_call>no</tool_call>'
    words, calls = split_calls(text)
    assert words == "Well.  And <tool_call>no</tool_call>"
    assert [call["function"] for call in calls] == [{"name": "a", "arguments": '{"x": {"y": 1}}'}]
    odd = '<tool_call>{"name": "a", "arguments": {"x": NaN}}</tool_call><tool_call>[1]</tool_call></tool_call>'
    assert split_calls(odd) == (odd, [])
    assert [len(split_calls(text * 2, parallel)[1]) for parallel in (True, False)] == [2, 1]
    (half,) = split_calls('<tool_call>{"name": "a", "arguments": {"x": "\\ud800"}}</tool_call>')[1]
    assert half["function"]["arguments"] == '{"x": "?"}'
    assert len(split_calls("<tool_call>{" * 100_000 + "</tool_call>" * 100_000)[0]) == 2_400_000
    marked = '<tool_call>{"name": "a", "arguments": {"x": "</tool_call> <tool_call>"}} </tool_call>!'
    assert [call["function"]["arguments"] for call in split_calls(marked)[1]] == ['{"x": "</tool_call> <tool_call>"}']
    for size in (1, 3, 200):
        stream = TextBeforeCalls()
        said = "".join(stream.push(text[at : at + size]) for at in range(0, len(text), size))
        assert said == "Well. "
        assert said + stream.held == text
    stream = TextBeforeCalls()
    assert "".join(map(stream.push, "a <tool b")) == "a <tool b"
    stream = TextBeforeCalls()
    assert [*map(stream.push, ("\n", "<tool_call>", "{"))] == ["", "", ""], "white space before a call is no text"
    stream = TextBeforeCalls()
    assert [*map(stream.push, ("\n", "a", "\n", "b"))] == ["", "\na", "\n", "b"]
