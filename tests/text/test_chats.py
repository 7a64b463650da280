from pathlib import Path

import pytest

from dash_export.errors import RequestError
from dash_export.text import chats
from dash_export.text.chats import Chat, chats_text, parsed_chats, read_prompts


def test_prompts_in_all_their_forms(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        '{"prompt": "a"}\n\n{"turns": ["b", "c"]}\r\n{"messages": [{"role": "user", "content": "d\u2028"}]}\n'
    )
    found = read_prompts(path)
    assert [(chat.messages[-1]["content"], chat.later) for chat in found] == [("a", ()), ("b", ("c",)), ("d\u2028", ())]
    path.write_text('{"system": "s", "turns": ["a"]}')
    assert [message["role"] for message in read_prompts(path)[0].messages] == ["system", "user"]


def test_prompts_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What JSON makes of a line takes thirty times its letters."""
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n' + '{"prompt": "' + "b" * chats.MAX_PROMPT + '"}\n')
    with pytest.raises(RequestError, match=r"line 2: \d+ prompts of 1048576 letters at most"):
        read_prompts(path)
    monkeypatch.setattr(chats, "MAX_PROMPTS", 3)
    path.write_text('{"prompt": "a"}\n' * 3)
    assert len(read_prompts(path)) == 3
    path.write_text('{"prompt": "a"}\n' * 4)
    with pytest.raises(RequestError, match="line 4: 3 prompts of"):
        read_prompts(path)


WRONG = """{"prompt": "a", "answer": 3} | { | [] | 3 | {"turns": []} | {"turns": ["a", 3]} | {"prompt": 4}
| {"system": 1, "prompt": "a"} | {"messages": [{"role": "user"}]}"""


@pytest.mark.parametrize("line", WRONG.split("|"))
def test_a_line_that_is_no_prompt_is_named(line: str) -> None:
    with pytest.raises(RequestError, match="t, line 2: not a prompt"):
        parsed_chats('{"prompt": "a"}\n' + line.strip(), "t")


def test_answered_chats_are_read_as_they_were_written() -> None:
    messages = [{"role": "user", "content": "a\u2028b"}, {"role": "assistant", "content": "c"}]
    assert parsed_chats(chats_text([(messages, "d\n"), (messages[:1], "")]), "t") == [
        Chat(messages, (), "d\n"), Chat(messages[:1], (), "")
    ]  # fmt: skip
