"""The process that renders a model's chat template for chat_template.py: a script of jinja2 and the standard library.

Each line of standard input is JSON and is answered by one line. The first is {path, memory in bytes}, the second
{source}, every later one the variables of a render. An answer is [whether it went well, text]. The process ends with
its input, or when memory runs out.
"""

import importlib
import json
import resource
import sys
import time
from datetime import datetime
from typing import Any

SECONDS = 5
"""Processor time for one answer: it ends the process where the parent is gone and cannot."""
IMPORTED_LATE = (
    "encodings.unicode_escape", "jinja2.constants", "jinja2.debug", "html", "pprint", "textwrap", "unicodedata"
)  # fmt: skip
"""Modules that jinja2 and Python import in the midst of their work, when no file can be opened any more."""


def make_environment() -> Any:
    """Return the environment that transformers gives a chat template."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationMarks(Extension):
        """`{% generation %}...{% endgeneration %}`, which marks the assistant's words for training: just text."""

        tags = {"generation"}  # noqa: RUF012  as jinja2 has it

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", GenerationMarks]
    )
    made.globals |= {"raise_exception": raise_exception, "strftime_now": lambda form: datetime.now().strftime(form)}
    made.filters["tojson"] = tojson
    return made


def limit(kind: int, most: int, final: bool = True) -> None:
    """Set a limit of the operating system: for good or, where not `final`, until the next call."""
    _, highest = resource.getrlimit(kind)
    most = most if highest == resource.RLIM_INFINITY else min(most, highest)
    resource.setrlimit(kind, (most, most if final else highest))


def main() -> None:
    requests = map(json.loads, sys.stdin.buffer)
    setup = next(requests)
    sys.path[:] = setup["path"]
    environment, template = make_environment(), None
    for name in IMPORTED_LATE:
        importlib.import_module(name)
    time.tzset()  # opens a file, which the limits below forbid
    limit(resource.RLIMIT_AS, setup["memory"])
    limit(resource.RLIMIT_FSIZE, 0)
    limit(resource.RLIMIT_CORE, 0)
    limit(resource.RLIMIT_NOFILE, 3)
    print('[true, ""]', flush=True)
    for request in requests:
        limit(resource.RLIMIT_CPU, int(time.process_time()) + SECONDS, final=False)
        try:
            if template is None:
                template, text = environment.from_string(request["source"]), ""
            else:
                text = template.render(request)
            answer = json.dumps([True, text])
        except MemoryError:
            raise
        except Exception as error:  # a template can raise anything
            answer = json.dumps([False, f"{type(error).__name__}: {error}"[:300]])
        print(answer, flush=True)


if __name__ == "__main__":
    main()
