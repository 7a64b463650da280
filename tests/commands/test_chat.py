"""The commands of `run --chat`: what each changes of the conversation, and what it refuses."""

import re
from pathlib import Path

from dash_export.bundle.bundle import Bundle
from dash_export.commands.chat import COMMANDS
from dash_export.text.chats import read_prompts
from tests.commands.helpers import dash, done

FP32, DENSE = ("--target", "cpu-fp32", "--max-tokens", 6), ("--policy", "dense")


def said(root: Path, *lines: str, options: tuple[str, ...] = DENSE) -> tuple[str, str]:
    """What a conversation of these lines writes to stdout and to stderr; it must end well."""
    result = done("run", root, "--chat", *FP32, *options, input="\n".join(lines) + "\n")
    return result.stdout, result.stderr


def test_help_and_what_was_mistyped(tiny_root: Path) -> None:
    told = said(tiny_root, "/help", "/sytem be kind", "/what", "/quit")[1]
    assert all(f"/{command} " in told for command in COMMANDS)
    assert "There is no command '/sytem'. Did you mean /system? /help lists the commands" in told
    assert "There is no command '/what'. /help" in told
    assert "tokens/s" not in told, "nothing of it was a message"


def test_system(tiny_root: Path) -> None:
    """From the next answer on, and after a reset; without a text there is none any more."""
    plain, _ = said(tiny_root, "hello")
    kind, _ = said(tiny_root, "hello", options=(*DENSE, "--system", "be kind"))
    assert plain != kind
    assert said(tiny_root, "/system be kind", "hello", "/reset", "hello")[0] == 2 * kind
    assert said(tiny_root, "/system be kind", "/system", "hello")[0] == plain


def test_budget(tiny_root: Path) -> None:
    """Of the next answers: 1 is dense, less skips; the conversation goes on."""
    budget = Bundle.open(tiny_root).load_build("cpu-fp32").dial[-1].time
    lines = (f"/budget {budget:.3f}1", "hello", "/budget 1", "and now", "/stats")
    shown, told = said(tiny_root, *lines, options=(*DENSE, "--show-skips", "--max-tokens", "9"))
    answers = [[int(layers) for layers in re.findall(r"‹(\d)›", line)] for line in shown.splitlines()[1:]]
    assert min(answers[0]) < 6
    assert {*answers[1]} == {6}
    assert f"From the next answer on: token, budget {budget:.3f}1." in told
    assert "From the next answer on: dense." in told
    assert "[2 answers, dense, " in told
    steps = [len(answer) - 1 for answer in answers]
    layers = sum(sum(answer[1:]) for answer in answers) / sum(steps)
    assert f"{layers:.1f} of 6 layers/token" in told.rpartition("[2 answers")[2]
    assert re.search(r", \d+ of 512 positions used\]$", told, re.MULTILINE)
    assert "[0 answers, dense, 0 tokens, " in said(tiny_root, "/stats")[1]


def test_save_and_load(tiny_root: Path, tmp_path: Path) -> None:
    """What was loaded goes on as it would have; `eval` and `train` read the file; it may be written again."""
    file, system = tmp_path / "talk.jsonl", (*DENSE, "--system", "be kind")
    first, told = said(tiny_root, "hello", f"/save {file}", f"/save {file}", options=system)
    assert f"Saved to {file}." in told
    (chat,) = read_prompts(file)
    assert chat.messages == [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}]
    assert first == f"{chat.answer}\n"
    both, _ = said(tiny_root, "hello", "and now", options=system)
    later, told = said(tiny_root, "something else", "/reset", f"/load {file}", "and now", f"/save {file}")
    assert "Loaded: 1 turns." in told
    assert both.removeprefix(first) == later.split("\n", 1)[1]
    assert len(read_prompts(file)[0].messages) == 4
    told = said(tiny_root, "something else", f"/load {file}", "/stats")[1]
    assert ", 0 of 512 positions used]" in told, "nothing is left of the conversation before"


REFUSED = {
    "/budget": "/budget takes a number above 0 and up to 1, like 0.85, not ''.",
    "/budget much": "not 'much'",
    "/budget 0.01": "is below the",
    "/budget nan": "not 'nan'",
    "/save": "/save takes the name of a file, like /save talk.jsonl.",
    "/save {mine}": "mine.txt exists: it will not be overwritten. Choose another name.",
    "/save {mine}/x.jsonl": "could not be read or written",
    "/save {link}": "link.txt exists: it will not be overwritten.",
    "/save {bundle}/x.jsonl": "inside the bundle",
    "/load": "/load takes the name of a file",
    "/load nothing.jsonl": "no text file",
    "/load {mine}": "not a prompt",
    "/load {prompts}": "is no conversation that /save wrote",
    "/load {one}": "is no conversation that /save wrote",
}


def test_what_cannot_be_done(own_bundle: Path, tmp_path: Path) -> None:
    """A script hears of it by the exit code; the conversation goes on, and the user's files are as they were."""
    files = {name: tmp_path / f"{name}.txt" for name in ("mine", "prompts", "one", "link")}
    files["mine"].write_text("mine")
    files["prompts"].write_text('{"prompt": "a", "answer": "b"}\n' * 2)
    files["one"].write_text('{"messages": [{"role": "assistant", "content": "a"}], "answer": "b"}\n')
    files["link"].symlink_to("nowhere")
    lines = ["/save x.jsonl", "hello", *(line.format(bundle=own_bundle, **files) for line in REFUSED), "hello"]
    result = dash("run", own_bundle, "--chat", *FP32, *DENSE, input="\n".join(lines))
    assert result.exit_code == 1
    _, *told = result.stderr.split("Error: ")
    for said, expected in zip(told, ("There is nothing to save yet", *REFUSED.values()), strict=True):
        assert expected in said
    assert result.stderr.count("[6 tokens") == 2
    assert files["mine"].read_text() == "mine"
    assert files["link"].is_symlink()
