"""Chat templates: as transformers renders them, and those that mean no good, in a process with nothing to lose."""

from __future__ import annotations

import gc
import os
import re
import resource
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from dash_export.errors import BundleError, DashError, RequestError
from dash_export.runtime import chat_template
from dash_export.runtime.chat_template import ChatTemplate
from tests.tiny import CHAT_TEMPLATE

MESSAGES = [{"role": "user", "content": "Hi"}]
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
LOOPS_WHEN_ASKED = "{% if messages[0].content == 'loop' %}" + LOOP + "{% endif %}{{ messages[0].content }}"
ASKED = [{"role": "user", "content": "loop"}]


def child(template: ChatTemplate) -> int:
    """The process id of this process's child."""
    _, children = template._here[os.getpid()]
    return children[0]._process.pid


def is_gone(pid: int, seconds: float = 5) -> bool:
    """Whether a process ends in time; one that only its parent has not reaped counts as ended."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if re.search(r"^State:\s+[ZX]", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE):
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.01)
    return False


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


def kept(value: str) -> str:
    """A template that keeps very many values, each of MORE, a new megabyte."""
    return (
        "{% set n = namespace(x=[]) %}{% for i in range(99999) %}{% set n.x = n.x + ["
        + value.replace("MORE", "'a' * 1_000_000 ~ i")
        + "] %}{% endfor %}"
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
    "shared-list": doubled("[n.x, n.x]") + "{{ n.x }}",
    "shared-tuple": doubled("(n.x, n.x)") + "{{ n.x }}",
    "shared-dict": doubled("{'a': n.x, 'b': n.x}") + "{{ n.x }}",
    "shared-call": doubled("dict(a=n.x, b=n.x)") + "{{ n.x }}",
    "double-sum": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] | sum(start=[]) %}"
    "{% endfor %}",
    "double-json": doubled("n.x | tojson"),
    "double-repr": doubled("n.x | pprint"),
    "urlize": doubled("'http://a.de ' | urlize(target=n.x) ~ n.x"),
    "square": "{% set n = namespace(x=9) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "bytes": "{{ 'a'.encode() * 10000000000 }}",
    "int-bytes": "{{ (1).to_bytes(10000000000, 'big') }}",
    "nested-blocks": "{% for a in [1] %}" * 25 + "x" + "{% endfor %}" * 25,
    "long-number": "{{ " + "1" * 5000 + " }}",
    "lipsum": "{{ lipsum(n=1000000) }}",
    "undefined": "{{ messages[9].role.text }}",
    "raise": "{{ raise_exception('no system role') }}",
    "divide": "{{ 1 / 0 }}",
    "loops": LOOP,
    "cycler": kept("cycler(MORE)"),
    "joiner": kept("joiner(MORE)"),
    "lazy-map": kept("[MORE] | map('upper')") + "{{ n.x | map('list') | list }}",
    "range-list": "{{ range(10**12) | list }}",
    "folded-power": "{{ 9 ** (9 ** 9) }}",
    "folded-time": "{{ 7 ** 99999999 % 3 }}",
    "deep-list": "{{ " + "[" * 50_000 + "]" * 50_000 + " }}",
    "deep-not": "{{ " + "not " * 50_000 + "1 }}",
    "five-megabytes": "{{ messages }}" * (5_000_000 // 14),
    "writes": "{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}",
    "writes-at-once": "{{ 'a' * 20_000_000 }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_template(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused by an error a user can read, soon, and at no cost here; nothing of Python leaks."""
    monkeypatch.setattr(chat_template, "SECONDS", 0.5)
    memory, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(DashError, match="template") as caught:
        ChatTemplate(HOSTILE[name], {}).render(MESSAGES)
    assert len(str(caught.value)) < 500
    assert time.monotonic() - start < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 64 << 10  # KiB


@pytest.mark.parametrize("name", ["many-shown", "double", "double-sum", "joiner", "lazy-map", "pad", "repeat-list"])
def test_memory_is_what_ends_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "SECONDS", 30.0)
    with pytest.raises(RequestError, match=r"512 MB.*its process has ended"):
        ChatTemplate(HOSTILE[name], {}).render(MESSAGES)


def test_child_has_limits() -> None:
    template = ChatTemplate(LOOPS_WHEN_ASKED, {})
    template.render(MESSAGES)
    limits = Path(f"/proc/{child(template)}/limits").read_text()
    for name, most in (("address space", 512 << 20), ("file size", 0), ("core file size", 0), ("open files", 3)):
        assert re.search(rf"^Max {name}\s+{most}\s+{most}\s", limits, re.MULTILINE), name
    assert re.search(r"^Max cpu time\s+[567]\s", limits, re.MULTILINE)
    assert os.getsid(child(template)) == child(template)  # Ctrl-C is not for it


def test_memory_of_one_turn_is_not_kept_for_the_next() -> None:
    template = ChatTemplate("{% set x = 'a' * 9_000_000 %}{{ x | length }}", {})
    assert [template.render(MESSAGES) for _ in range(100)] == ["9000000"] * 100


def test_next_render_is_well_after_one_that_was_not(monkeypatch: pytest.MonkeyPatch) -> None:
    template = ChatTemplate(LOOPS_WHEN_ASKED, {})
    monkeypatch.setattr(chat_template, "SECONDS", 0.5)
    assert template.render(MESSAGES) == "Hi"
    looping = child(template)
    with pytest.raises(RequestError, match=r"0\.5 s .*timed out"):
        template.render(ASKED)
    assert not Path(f"/proc/{looping}").exists()  # ended and reaped
    assert template.render(MESSAGES) == "Hi"
    os.kill(child(template), signal.SIGKILL)
    assert is_gone(child(template))
    assert template.render(MESSAGES) == "Hi"


def test_interrupted_render() -> None:
    """Ctrl-C in the middle of one: half an answer must not be the next one's."""
    template = ChatTemplate(LOOPS_WHEN_ASKED, {})
    template.render(MESSAGES)
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            template.render(ASKED)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert template.render(MESSAGES) == "Hi"


def test_a_refusal_does_not_end_the_child() -> None:
    template = ChatTemplate("{{ raise_exception('no') if messages[0].content == 'loop' else 'yes' }}", {})
    template.render(MESSAGES)
    first = child(template)
    with pytest.raises(RequestError, match="TemplateError: no"):
        template.render(ASKED)
    assert template.render(MESSAGES) == "yes"
    assert child(template) == first


def test_threads_share_a_child() -> None:
    template = ChatTemplate("{{ messages[0].content * 1000 }}", {})

    def render(number: int) -> bool:
        return template.render([{"role": "user", "content": f"{number} "}]) == f"{number} " * 1000

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(render, range(200)))
    assert len(template._here[os.getpid()][1]) == 1


def test_forked_process_has_a_child_of_its_own() -> None:
    template = ChatTemplate(CHAT_TEMPLATE, {})
    expected, first = template.render(MESSAGES), child(template)
    if not (forked := os.fork()):
        code = 1
        with suppress(BaseException):
            same = template.render(MESSAGES) == expected and child(template) != first
            del template
            gc.collect()
            code = 0 if same else 2
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(forked, 0)[1]) == 0
    assert template.render(MESSAGES) == expected
    assert child(template) == first


def test_child_ends_with_its_template() -> None:
    template = ChatTemplate(CHAT_TEMPLATE, {})
    template.render(MESSAGES)
    pid = child(template)
    del template
    gc.collect()
    assert not Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize("end", ["pass", "os.kill(os.getpid(), 9)"])
def test_child_ends_with_its_parent(end: str) -> None:
    code = (
        "import os, sys; from dash_export.runtime.chat_template import ChatTemplate; t = ChatTemplate('x', {})\n"
        f"t.render([]); print(t._here[os.getpid()][1][0]._process.pid, flush=True); {end}"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert is_gone(int(result.stdout))
    assert not result.stderr


def test_a_template_is_read_when_it_is_needed() -> None:
    code = (
        "import sys; from dash_export.runtime.text import ChatTemplate; t = ChatTemplate('{% for %}', {})\n"
        "print('jinja2' in sys.modules, t._here)"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True, timeout=60) == "False {}\n"


@pytest.mark.parametrize(
    ("name", "value"), [("executable", ""), ("executable", "/no/python"), ("frozen", True), ("path", [])]
)
def test_no_python_to_render_with(name: str, value: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """An embedded interpreter, a frozen program, and one without jinja2."""
    if name == "path":
        value = [entry for entry in sys.path if "site-packages" not in entry]
    monkeypatch.setattr(sys, name, value, raising=False)
    with pytest.raises(RequestError, match=r"sys\.executable"):
        ChatTemplate("x", {}).render(MESSAGES)


@pytest.mark.parametrize(
    "answers",
    ["print('{')", "print('[]')", "print('[1, 2, 3]')", "print('[' * 999_999)", "os.kill(os.getpid(), 11)",
     "while True: print('x' * 99_999, end='')", "while True: print('x', end='', flush=True); time.sleep(0.1)",
     "time.sleep(99)", "sys.stdout.close(); os.close(1); time.sleep(99)"],
)  # fmt: skip
def test_child_that_talks_nonsense(answers: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one could that broke out of the sandbox."""
    script = tmp_path / "child.py"
    script.write_text(
        "import os, sys, time\nsys.stdin.readline(); print('[true, \"\"]', flush=True); sys.stdin.readline()\n"
        f"{answers}\nsys.stdout.flush(); time.sleep(99)"
    )
    monkeypatch.setattr(chat_template, "CHILD", script)
    monkeypatch.setattr(chat_template, "SECONDS", 0.5)
    start = time.monotonic()
    with pytest.raises(RequestError, match="template"):
        ChatTemplate("x", {}).render(MESSAGES)
    assert time.monotonic() - start < 5


def test_any_text_comes_through() -> None:
    """Half characters (refused later, as any text's), line ends of every kind, and what is no text."""
    content = "\ud83d \x00\r\n\u2028\x85 \udc00 🙂" * 20_000
    messages = [{"role": "user", "content": content, "number": 2, "of": {"calls": [None, True]}}]
    template = ChatTemplate(
        "{{ messages[0].content }}{{ messages[0].number + 1 }}{{ messages[0].of.calls[0] is none }}", {}
    )
    assert template.render(messages) == f"{content}3True"  # type: ignore[list-item]


def test_messages_that_no_json_can_say() -> None:
    with pytest.raises(RequestError, match="numbers, lists and mappings"):
        ChatTemplate("x", {}).render([{"role": "user", "content": "x", "more": {1, 2}}])  # type: ignore[dict-item]


SHARED = (
    "{% for m in messages %}{% if loop.index == 3 %}{% break %}{% endif %}\n    {{ m | tojson(indent=2) }}\n"
    "{% endfor %}"
    "{% generation %}{{ messages | tojson(sort_keys=true, separators=(',', ':')) }}{% endgeneration %}",
    "{{ 'one two' | wordwrap(3) }}{{ messages | pprint }}{{ '&lt;b&gt;<i>x</i>' | striptags }}{{ 'é\\u00e9' | e }}"
    "{{ strftime_now('%d %b %Y') }}{{ bos_token }}{{ messages | map(attribute='role') | join(', ') }}{{ nothing }}",
    "{%- set ns = namespace(found=false) %}\n{%- for m in messages[::-1] %}{% set ns.found = m.role %}{% endfor %}\n"
    "  {{- ns.found ~ messages[0]['content'].split('i')[0].strip() }}{% macro f(x) %}<{{ x }}>{% endmacro %}{{ f(7) }}",
)  # fmt: skip


@pytest.mark.parametrize("source", SHARED)
def test_as_transformers_renders_it(source: str) -> None:
    messages = [{"role": role, "content": f"Hi «{role}» <&> ☕"} for role in ("user", "assistant", "user")]
    (expected,), _ = render_jinja_template(
        [messages], chat_template=source, add_generation_prompt=True, bos_token="<s>"
    )
    assert ChatTemplate(source, {"bos_token": "<s>"}).render(messages) == expected


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
    template = ChatTemplate(source, {})
    for _ in range(2):
        with pytest.raises(BundleError, match="template is not valid"):
            template.render(MESSAGES)


@pytest.mark.parametrize(
    "message", [{}, {"role": "user"}, {"role": 1, "content": "x"}, {"role": "user", "content": None}]
)
def test_messages_without_text(message: dict[str, object]) -> None:
    with pytest.raises(RequestError, match="'role' and a 'content'"):
        ChatTemplate(CHAT_TEMPLATE, {}).render([message])  # type: ignore[list-item]
