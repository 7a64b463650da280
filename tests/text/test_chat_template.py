"""Chat templates: as transformers renders them, and those that mean no good, in a child process."""

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
from dash_export.text import chat_template
from dash_export.text.chat_template import ChatTemplate
from tests.tiny import CHAT_TEMPLATE

MESSAGES = [{"role": "user", "content": "Hi"}]
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
LOOPS_WHEN_ASKED = "{% if messages[0].content == 'loop' %}" + LOOP + "{% endif %}{{ messages[0].content }}"
ASKED = [{"role": "user", "content": "loop"}]


def child(template: ChatTemplate) -> int:
    """The process id of this process's child."""
    assert template._child is not None
    return template._child.process.pid


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


def doubled(expression: str) -> str:
    """A template that puts the expression's value in n.x, 60 times."""
    return "{% set n = namespace(x='aa') %}{% for i in range(60) %}{% set n.x = " + expression + " %}{% endfor %}"


FIVE_MILLION = "{% set n = namespace(s='aaaaaaaaaa') %}{% for i in range(19) %}{% set n.s = n.s ~ n.s %}{% endfor %}"
HOSTILE = {
    "attributes": "{{ ().__class__.__base__.__subclasses__() }}",
    "mutate": "{{ messages.append(1) }}",
    "raise": "{{ raise_exception('no system role') }}",
    "loops": LOOP,
    "power": "{{ 9 ** 999999999 }}",
    "folded-power": "{{ 9 ** (9 ** 9) }}",
    "square": "{% set n = namespace(x=9) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "repeat": "{{ [0] * 10000000000 }}",
    "pad": "{{ '%9999999999d' % 1 }}",
    "filter": "{{ 'a' | center(10000000000) }}",
    "double": doubled("n.x ~ n.x"),
    "double-replace": doubled("n.x.replace('a', n.x)"),
    "shared": doubled("[n.x, n.x]") + "{{ n.x }}",
    "namespaces": doubled("namespace(a=n.x, b=n.x)") + "{{ n.x }}",
    "urlize": doubled("'http://a.de ' | urlize(target=n.x) ~ n.x"),
    "shown": FIVE_MILLION + "{{ [" + "n.s, " * 2000 + "] }}",
    "kept": "{% set n = namespace(x=[]) %}{% for i in range(99999) %}"
    "{% set n.x = n.x + [joiner('a' * 1_000_000 ~ i)] %}{% endfor %}",
    "writes": "{{ 'a' * 20_000_000 }}",
    "long-number": "{{ " + "1" * 5000 + " }}",
    "deep": "{{ " + "[" * 50_000 + "]" * 50_000 + " }}",
    "nested-blocks": "{% for a in [1] %}" * 25 + "x" + "{% endfor %}" * 25,
    "five-megabytes": "{{ messages }}" * (5_000_000 // 14),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_template(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused by an error a user can read, soon, and at no cost here; nothing of Python leaks."""
    monkeypatch.setattr(chat_template, "SECONDS", 0.3)
    memory, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(DashError, match="template") as caught:
        ChatTemplate(HOSTILE[name], {}).render(MESSAGES)
    assert len(str(caught.value)) < 500
    assert time.monotonic() - start < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 64 << 10  # KiB


@pytest.mark.parametrize("name", ["double", "kept"])
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


def test_next_render_is_well_after_one_that_was_not(monkeypatch: pytest.MonkeyPatch) -> None:
    template = ChatTemplate(LOOPS_WHEN_ASKED, {})
    monkeypatch.setattr(chat_template, "SECONDS", 0.5)
    assert template.render(MESSAGES) == "Hi"
    looping = child(template)
    with pytest.raises(RequestError, match=r"0\.5 s .*has ended"):
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


def test_threads_share_a_child() -> None:
    template = ChatTemplate("{{ messages[0].content * 1000 }}", {})

    def render(number: int) -> bool:
        return template.render([{"role": "user", "content": f"{number} "}]) == f"{number} " * 1000

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(render, range(200)))


def test_fork_while_another_thread_renders(monkeypatch: pytest.MonkeyPatch) -> None:
    template = ChatTemplate(LOOPS_WHEN_ASKED, {})
    template.render(MESSAGES)
    monkeypatch.setattr(chat_template, "SECONDS", 1.0)
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(template.render, ASKED)
        time.sleep(0.1)
        if not (forked := os.fork()):
            with suppress(BaseException):
                signal.alarm(30)
                os._exit(template.render(MESSAGES) != "Hi")
            os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(forked, 0)[1]) == 0
        assert isinstance(slow.exception(), RequestError)


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


@pytest.mark.parametrize("end", ["pass", "os.kill(os.getpid(), 9)"])
def test_child_ends_with_its_parent(end: str) -> None:
    code = (
        "import os, sys; from dash_export.text.chat_template import ChatTemplate; t = ChatTemplate('x', {})\n"
        f"t.render([]); print(t._child.process.pid, flush=True); {end}"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert is_gone(int(result.stdout))
    assert not result.stderr


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
    ["print('[]')", "print('[' * 999_999)", "os.kill(os.getpid(), 11)", "while True: print('x' * 99_999, end='')",
     "while True: print('x', end='', flush=True); time.sleep(0.1)", "sys.stdout.close(); os.close(1); time.sleep(99)"],
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


SHARED = (
    "{% for m in messages %}{% if loop.index == 3 %}{% break %}{% endif %}\n    {{ m | tojson(indent=2) }}\n"
    "{% endfor %}"
    "{% generation %}{{ messages | tojson(sort_keys=true, separators=(',', ':')) }}{% endgeneration %}",
    "{{ messages[0].content.replace('H', 'h') }}{{ ['a', 'b'] | join('-') }}{{ 'Hii' | replace('i', 'o', 1) | upper }}"
    "{% for a, b in [(1, 2), (3, 4)] %}{{ [a, b] | sum }}{% endfor %}{{ dict(a=1).a }}{{ 70000 * 70000 }}"
    "{{ messages[0].items() | list | length }}{{ '{0.__class__}'.format(messages) if false else '-'.join(['c']) }}",
    "{{ 'one two' | wordwrap(3) }}{{ messages | pprint }}{{ '&lt;b&gt;<i>x</i>' | striptags }}{{ 'é\\u00e9' | e }}"
    "{{ strftime_now('%d %b %Y') }}{{ bos_token }}{{ messages | map(attribute='role') | join(', ') }}{{ nothing }}",
    "{%- set ns = namespace(found=false) %}\n{%- for m in messages[::-1] %}{% set ns.found = m.role %}{% endfor %}\n"
    "  {{- ns.found ~ messages[0]['content'].split('i')[0].strip() }}{% macro f(x) %}<{{ x }}>{% endmacro %}{{ f(7) }}",
    "{% if tools is not none %}call{% endif %}{{ tools is defined }}{{ documents | tojson }}{{ documents is none }}",
)  # fmt: skip


@pytest.mark.parametrize("source", SHARED)
def test_as_transformers_renders_it(source: str) -> None:
    messages = [{"role": role, "content": f"Hi «{role}» <&> ☕"} for role in ("user", "assistant", "user")]
    template = ChatTemplate(source, {"bos_token": "<s>"})
    (expected,), _ = render_jinja_template(
        [messages], chat_template=source, add_generation_prompt=True, bos_token="<s>"
    )
    assert template.render(messages) == expected
    pid = child(template)
    del template
    gc.collect()
    assert not Path(f"/proc/{pid}").exists(), "a child ends with its template"


@pytest.mark.parametrize("said", ["Well", "Well, ", " Well\n"])
@pytest.mark.parametrize("source", [CHAT_TEMPLATE, CHAT_TEMPLATE.replace(".content", ".content | trim")])
def test_a_message_is_continued_as_transformers_does(source: str, said: str) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": said}]
    (expected,), _ = render_jinja_template([messages], chat_template=source, continue_final_message=True)
    assert ChatTemplate(source, {}).render(messages, continues=True) == expected


@pytest.mark.parametrize("source", ["{% for %}", "{{ 'x' | no_such_filter }}"])
def test_template_with_wrong_syntax(source: str) -> None:
    template = ChatTemplate(source, {})
    for _ in range(2):
        with pytest.raises(BundleError, match="template is not valid"):
            template.render(MESSAGES)


@pytest.mark.parametrize("message", [{}, {"role": 1, "content": "x"}, {"role": "a", "content": "b", "more": {1, 2}}])
def test_messages_without_text(message: dict[str, object]) -> None:
    with pytest.raises(RequestError, match=r"'role' and a 'content'|numbers, lists and mappings"):
        ChatTemplate(CHAT_TEMPLATE, {}).render([message])  # type: ignore[list-item]
