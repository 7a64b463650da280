"""`run`: text, JSON, skips shown, conversation, settings that cannot be."""

import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from dash_export import DashRuntime
from dash_export.bundle.bundle import Bundle
from dash_export.commands import chat
from dash_export.errors import RequestError
from dash_export.text.tokenizer import Text
from tests.commands.helpers import dash, done, environment, refused
from tests.forged import rehash, replace_text

# A run whose every decoded token takes 20 ms, so that it can be interrupted.
SLOW_RUN = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background has it ignored
from dash_export.backends.host.decode import BoundStep
decode = BoundStep._advance
def slow(*arguments):
    time.sleep(0.02)
    return decode(*arguments)
BoundStep._advance = slow
from dash_export.cli import cli
cli(["run", *sys.argv[1:]], prog_name="dash-export")
"""
FP32 = ("--target", "cpu-fp32")
DENSE = ("--policy", "dense")


def run_json(*arguments: object, input: str | None = None) -> dict[str, Any]:
    result = done("run", *arguments, "--json", input=input)
    assert result.stdout.count("\n") == 1
    return json.loads(result.stdout)


def test_text_and_figures(tiny_root: Path) -> None:
    result = done("run", tiny_root, "hello", *FP32, "--max-tokens", 5, *DENSE)
    assert "[5 tokens," in result.stderr
    assert "6.0 of 6 layers/token" in result.stderr
    assert "; cut at 5 tokens, see --max-tokens]" in result.stderr
    assert result.stdout.endswith("\n")
    figures = run_json(tiny_root, "a" * 400, *FP32)["statistics"]
    assert figures["prompt_tokens"] + figures["tokens"] <= 512, "by default as many as the context holds"
    figures = run_json(tiny_root, "hello", *FP32, *DENSE, "--max-tokens", 1)["statistics"]
    assert figures["tokens"] == 1
    assert not {"tokens_per_second", "layers_per_token"} & figures.keys(), "its only token comes from the prompt"


def test_json_equals_the_library(tiny_root: Path, tiny_runtime: Callable[..., DashRuntime]) -> None:
    found = run_json(tiny_root, "hello", *FP32, *DENSE, "--max-tokens", 6)
    runtime = tiny_runtime("cpu-fp32")
    expected = runtime.generate(runtime.text.chat([{"role": "user", "content": "hello"}]), 6)
    assert (found["tokens"], found["text"]) == (expected.tokens.tolist(), expected.text)
    assert found["finish_reason"] == expected.finish_reason
    assert found["statistics"]["layers_per_token"] == 6


def test_answers_of_a_form(tiny_root: Path, tmp_path: Path) -> None:
    """By a JSON schema, or a grammar; alone and for many prompts."""
    schema, grammar, prompts = (tmp_path / name for name in ("schema.json", "grammar.lark", "prompts.txt"))
    schema.write_text('{"enum": ["river", "lake"]}')
    grammar.write_text('start: "yes" | "no"')
    prompts.write_text("hello\nthere\n")
    for option, file, said in (("--json-schema", schema, {'"river"', '"lake"'}), ("--grammar", grammar, {"yes", "no"})):
        found = run_json(tiny_root, "hello", *FP32, *DENSE, option, file)
        assert found["text"] in said
        assert found["finish_reason"] == "stop"
        many = done("run", tiny_root, "--prompts", prompts, *FP32, *DENSE, "--json", option, file).stdout.splitlines()
        assert {json.loads(line)["text"] for line in many} <= said
    assert "exclude each other" in refused("run", tiny_root, "x", "--json-schema", schema, "--grammar", grammar, code=2)
    for text, why in (("{", "is not JSON"), ("[]", "is no JSON schema"), ('{"type": "no"}', "cannot be read")):
        schema.write_text(text)
        assert why in refused("run", tiny_root, "x", *FP32, "--json-schema", schema)


def test_raw_prompt_from_stdin(tiny_root: Path, tiny_runtime: Callable[..., DashRuntime]) -> None:
    expected = tiny_runtime("cpu-fp32").generate("hello", 4).tokens.tolist()
    assert run_json(tiny_root, *FP32, *DENSE, "--raw", "--max-tokens", 4, input="hello\n")["tokens"] == expected
    assert run_json(tiny_root, "-", *FP32, *DENSE, "--raw", "--max-tokens", 4, input="hello")["tokens"] == expected


@pytest.mark.parametrize(("factor", "told"), [(1.0, False), (0.001, True)])
def test_a_machine_slower_than_its_build(factor: float, told: bool, own_bundle: Path) -> None:
    bundle = Bundle.open(own_bundle)
    known = bundle.load_build("cpu-fp32")
    slow = replace(known.cost, dense_us=factor * 10_000)  # a token of the tiny model takes 100 us
    bundle.save_build(replace(known, cost=slow))
    result = dash("run", own_bundle, "--chat", *FP32, *DENSE, "--max-tokens", 30, input="hello\nhello\n")
    assert result.stderr.count("times as long as when the build was measured") == told, "once, not after every answer"


def test_without_an_amount_it_is_dense_with_drafts(tiny_root: Path) -> None:
    """Drafts are of the text's own repetitions where nothing is trained; the text is the same without them."""
    asked = (tiny_root, "a b a b a b a b a b a b", *FP32, "--raw", "--max-tokens", 60)
    found, plain = run_json(*asked), run_json(*asked, "--draft", "off")
    assert not any(found["actions"])
    assert found["tokens"] == plain["tokens"]
    assert found["statistics"]["drafts"] >= found["statistics"]["accepted"]
    assert plain["statistics"]["tokens_per_pass"] == 1
    assert "dense session" in refused("run", *asked, "--budget", 0.9, "--draft", "lookup")
    assert "has no drafter" in refused("run", *asked, "--draft", "layer")


def test_policies(tiny_root: Path) -> None:
    def actions(*options: object, tokens: int = 30) -> list[list[int]]:
        return run_json(tiny_root, "hello", *FP32, *options, "--max-tokens", tokens)["actions"]

    point = Bundle.open(tiny_root).load_build("cpu-fp32").dial[4]
    assert actions("--skip", "2-3", tokens=4) == [[], [2, 3], [2, 3], [2, 3]]
    assert actions("--policy", "static", "--skipped", 2)[1:] == [[2, 3, 4]] * 29
    assert actions("--policy", "token", "--trade-off", 0, tokens=3) == [[], [], []]
    assert all(len(skipped) >= 2 for skipped in actions("--trade-off", 0, "--max-layers", 4, tokens=4)[1:])
    for options in (("--skipped", 2), ("--max-kl", point.kl), ("--budget", point.time, "--no-hold")):
        assert any(actions(*options)), options


def test_show_skips_on_a_terminal(tiny_root: Path) -> None:
    """In colours. Without: test_chat.py."""
    main, side = pty.openpty()
    command = [sys.executable, "-m", "dash_export", "run", str(tiny_root), "hello", *FP32, "--skip", "4"]
    command += ["--max-tokens", "4", "--show-skips"]
    variables = {key: value for key, value in environment(TERM="xterm-256color").items() if key != "NO_COLOR"}
    ran = subprocess.run(command, stdout=side, stderr=subprocess.PIPE, env=variables, timeout=60, check=False)
    os.close(side)
    shown = os.read(main, 65536).decode(errors="replace")
    os.close(main)
    assert ran.returncode == 0, ran.stderr
    assert "\x1b[" in shown
    assert "‹5›" not in shown


def test_conversation(tiny_root: Path) -> None:
    """A full context ends a turn, not the conversation, and a script hears of it."""
    said = f"hello\n/reset\n\n/how are you\n{'a' * 600}\nhello\n/quit\nnever\n"
    result = dash("run", tiny_root, "--chat", *FP32, "--max-tokens", 3, input=said)
    assert result.exit_code == 1
    assert result.stderr.count("[3 tokens") == 3
    assert "Forgotten." in result.stderr
    assert "/reset" in result.stderr.partition("Error: ")[2]
    result = dash("run", tiny_root, "--chat", *FP32, "--max-tokens", 9000, input="hello\n")
    assert (result.exit_code, "/reset" in result.stderr.partition("Error: ")[2]) == (1, False)


@pytest.mark.parametrize("chat", [True, False])
def test_ctrl_c(chat: bool, tiny_root: Path) -> None:
    """It stops the answer of a conversation only, and ends a single one."""
    command = [sys.executable, "-c", SLOW_RUN, str(tiny_root), "--chat" if chat else "hello"]
    command += [*FP32, *DENSE, "--max-tokens", "400", "--show-skips"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, env=environment(), **pipes) as run:
        assert run.stdin is not None
        assert run.stdout is not None
        if chat:
            run.stdin.write("hello\n")
            run.stdin.flush()
            run.stdout.readline()  # the legend
        while run.stdout.read(1) != "‹":
            pass
        run.send_signal(signal.SIGINT)
        _, errors = run.communicate("/reset\n/quit\n" if chat else "", timeout=60)
    if chat:
        assert run.returncode == 0, errors
        assert "; stopped by Ctrl-C]" in errors
        assert "Forgotten." in errors
    else:
        assert run.returncode == 130
        assert errors.strip() == "Interrupted"


def test_a_second_ctrl_c_stops_a_prompt() -> None:
    """Which has no token at which it could end."""
    session = SimpleNamespace(cancel=mock.Mock())
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore the signal for jobs behind
    try:
        with chat._stopping(session):  # type: ignore[arg-type]
            signal.raise_signal(signal.SIGINT)
            assert session.cancel.called
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_targets(tiny_root: Path, own_bundle: Path, tmp_path: Path) -> None:
    assert "--target" in refused("run", tiny_root, "hello")  # two builds, none of them cpu
    assert "does not exist" in refused("run", tiny_root, "hello", "--target", "cpu")
    (own_bundle / "engines" / "portable" / "build.json").unlink()
    assert dash("run", own_bundle, "hello", "--max-tokens", 1).exit_code == 0
    assert "There is no bundle" in refused("run", tmp_path / "none.dash", "hello")
    assert "/etc/passwd is a file that is no bundle" in (said := refused("run", "/etc/passwd", "hello"))
    assert "-o /etc/passwd" not in said


def test_a_template_that_would_steer_the_terminal(own_bundle: Path, tmp_path: Path) -> None:
    replace_text(own_bundle / "chat_template.jinja", "{%", "{{ raise_exception('\\x1b]0;pwned\\x07') }}{%")
    rehash(own_bundle, "chat_template.jinja")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("hello\n")
    for given in (["hello"], ["--prompts", prompts]):
        message = refused("run", own_bundle, *given, *FP32)
        assert "pwned" in message
        assert "\x1b" not in message
    told = dash("run", own_bundle, "--chat", *FP32, input="hello\n").stderr
    assert "pwned" in told
    assert "\x1b" not in told


def test_a_model_without_a_template(own_bundle: Path) -> None:
    """It has no conversations. It continues a prompt, which is said once, and not to who asks for it."""
    (own_bundle / "chat_template.jinja").write_text("")
    rehash(own_bundle, "chat_template.jinja")
    for given in (["--chat"], ["hello", "--system", "be kind"]):
        assert "so there is no --chat and no --system" in refused("run", own_bundle, *given, *FP32)
    told, asked = (done("run", own_bundle, "hello", *FP32, *raw, "--max-tokens", 4) for raw in ([], ["--raw"]))
    assert told.stderr.count("no chat template: it continues the prompt as plain text") == 1
    assert "template" not in asked.stderr
    assert told.stdout == asked.stdout


@pytest.mark.parametrize("closed", [">&-", "<&- >&- 2>&-"])
def test_closed_streams(closed: str, tiny_root: Path) -> None:
    """No traceback, and nothing of ours takes their place."""
    command = f"{sys.executable} -m dash_export run {tiny_root} hello --max-tokens 2 --target cpu-fp32 {closed}"
    ran = subprocess.run(["sh", "-c", command], capture_output=True, text=True, env=environment(), check=False)
    assert "Traceback" not in ran.stderr + ran.stdout
    assert ran.returncode == 0, ran.stderr


def test_many_prompts(tiny_root: Path, tmp_path: Path) -> None:
    """Every line as it would be answered alone, whoever ends first."""
    lines = ["hello", "what is it", "a", "one two three four"]
    file = tmp_path / "prompts.txt"
    file.write_text("\n\n".join(lines) + "\n")
    options = (tiny_root, *FP32, "--skip", "4", "--max-tokens", 9)
    result = done("run", *options, "--prompts", file, "--batch", 3, "--json")
    assert "[4 answers," in result.stderr
    assert "up to 3 at a time" in result.stderr
    found = {answer["index"]: answer for answer in map(json.loads, result.stdout.splitlines())}
    for index, line in enumerate(lines):
        alone = run_json(*options, line)
        for name in ("text", "tokens", "actions", "finish_reason"):
            assert found[index][name] == alone[name]
    text = dash("run", *options, "--prompts", "-", "--raw", input="hello\nbye\n")
    assert text.stdout.startswith("0: hello\n")
    assert "1: bye\n" in text.stdout
    assert "up to 1 at a time" in done("run", *options[:1], "--target", "portable", "--skip", "4", "--max-tokens", 2,
                                       "--prompts", "-", input="a\nb\n").stderr  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("  ",), "prompt is empty"),
        (("hello", "--max-tokens", 600), "does not hold"),
        (("a" * 600,), "does not hold"),
        (("hello", "--skip", "0"), "not whole units"),
        (("hello", "--budget", 0.01), "A budget of 0.01 is below the 0."),
        (("hello", "--temperature", -1), "temperature"),
        (("hello", "--dispatch", "overlapped"), "GPU target"),
        (("hello", "--stop", ""), "stop"),
        (("hi", "--chat", "--json"), "exclude each other"),
        (("hi", "--json", "--show-skips"), "exclude each other"),
        (("hi", "--raw", "--system=be kind"), "exclude each other"),
        (("hi", "--prompts", "p.txt"), "exclude each other"),
        (("hi", "--batch", "2"), "--batch is for --prompts"),
        (("--prompts", "missing.txt"), "no text file"),
        (("--prompts", "empty.txt"), "has no prompt"),
        (("--prompts", "bytes.txt"), "UTF-8"),
    ],
)
def test_what_cannot_be(options: tuple[object, ...], message: str, tiny_root: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    paths = [tmp_path / option if str(option).endswith(".txt") else option for option in options]
    result = dash("run", tiny_root, *paths, *FP32)
    assert result.exit_code in (1, 2)
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_a_prompt_without_an_answer_stops_no_other(
    tiny_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One is too long, and one the template refuses."""
    chat = Text.chat

    def refusing(text: Text, messages: list[dict[str, str]], limit: int) -> list[int]:
        if messages[-1]["content"] == "no":
            raise RequestError("The chat template refuses these messages.")
        return chat(text, messages, limit)

    monkeypatch.setattr(Text, "chat", refusing)
    file = tmp_path / "prompts.txt"
    file.write_text(f"hello\n{'a' * 600}\nno\nbye\n")
    result = dash("run", tiny_root, *FP32, "--max-tokens", 4, "--prompts", file, "--batch", 2)
    assert result.exit_code == 1
    for expected in (
        "1: the prompt 'aaaa", "context does not hold this", "[2 answers, 8 tokens", "2 of 4 prompts have no answer",
        "2: the prompt 'no' has no answer. The chat template refuses",
    ):  # fmt: skip
        assert expected in result.stderr
    assert [line[:3] for line in result.stdout.splitlines() if line[1:3] == ": "] == ["0: ", "3: "]


def test_one_token_has_no_speed(tiny_root: Path) -> None:
    figures = run_json(tiny_root, "hello", *FP32, *DENSE, "--max-tokens", 1)["statistics"]
    assert figures["tokens"] == 1  # type: ignore[index]
    assert not {"tokens_per_second", "layers_per_token"} & figures.keys()  # type: ignore[attr-defined]


def test_default_length_fits_the_context(tiny_root: Path) -> None:
    found = run_json(tiny_root, "a" * 400, *FP32)
    statistics = found["statistics"]
    assert statistics["prompt_tokens"] + statistics["tokens"] <= 512  # type: ignore[index]
