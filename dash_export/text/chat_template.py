"""Chat templates, each rendered in a child process of its own (template_child.py) that is kept for the next turn.

A template is a program written by whoever made the model. jinja2's sandbox keeps it from Python's own attributes, the
operating system bounds its memory, and a timer its time. A template that gets past these can
only harm this child process.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

from dash_export.errors import BundleError, RequestError
from dash_export.files.typed_json import shown
from dash_export.text.child import Child

SECONDS = 2.0
MEGABYTES = 512
CHILD = Path(__file__).with_name("template_child.py")
INSTEAD = "Do not use it: replace chat_template.jinja of the model and export again."
_END = "<continues here>"
_RENDERS = Lock()
os.register_at_fork(before=_RENDERS.acquire, after_in_parent=_RENDERS.release, after_in_child=_RENDERS.release)


class ChatTemplate:
    """A model's `chat_template.jinja`, and its special tokens by name. Threads may share it. The child process starts
    with the first render and ends with this object.
    """

    def __init__(self, source: str, special: Mapping[str, str]) -> None:
        self.source, self._special = source, dict(special)
        self._child: Child | None = None

    def takes_tools(self) -> bool:
        """Return whether the template tells the model about tools, and to call them by `<tool_call>`."""
        return "tools" in self.source and "<tool_call>" in self.source

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] = (),
        continues: bool = False,
    ) -> str:
        """Render messages {role, content} as the prompt text; where it `continues`, only up to the end of the last
        message's text. Raises RequestError when the template refuses them or misbehaves, and BundleError when the
        template is not valid.
        """
        if continues:  # what follows a text cannot be told from the text: a mark says where it ends, as in transformers
            last = {**messages[-1], "content": f"{messages[-1]['content']}{_END} "}
            before, mark, after = self.render([*messages[:-1], last], False, tools).rpartition(_END)
            if not mark:
                raise RequestError("The chat template leaves out the last message, which is to be continued.")
            return before if after.startswith(" ") else before.rstrip()  # as the template does at a text's end
        for message in messages:
            if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
                raise RequestError(f"A chat message needs a 'role' and a 'content', both text; got {shown(message)}.")
        given = {"messages": [*map(dict, messages)], "add_generation_prompt": add_generation_prompt, **self._special}
        given |= {"tools": [*tools] or None, "documents": None}  # as transformers passes them
        try:
            request = json.dumps(given)
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestError(f"Chat messages must be text, numbers, lists and mappings ({error}).") from error
        costly = f"The chat template takes over {SECONDS:g} s or {MEGABYTES} MB for these messages, or breaks"
        with _RENDERS:
            if self._child is None or not self._child.alive:
                child = Child(CHILD, {"memory": MEGABYTES << 20})
                good, text = child.ask(json.dumps({"source": self.source}), SECONDS, costly, INSTEAD)
                if not good:
                    child.end()
                    raise BundleError(f"The bundle's chat template is not valid ({text}). {INSTEAD}")
                self._child = child
            good, text = self._child.ask(request, SECONDS, costly, INSTEAD)
        if not good:
            raise RequestError(f"The chat template refuses these messages ({text}).")
        return text
