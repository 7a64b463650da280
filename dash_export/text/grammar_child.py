"""The process that tries a grammar before guidance.py reads it: a script of llguidance and the standard library.

Each line of standard input is JSON and is answered by one line. The first is {path, tokenizer, eos, memory, seconds,
states}, every later one {grammar}. An answer is [whether the grammar can be read within memory and time, text]: text is
the share of memory or time that the grammar takes, or what is wrong.
"""

import json
import os
import resource
import signal
import sys
import time
from pathlib import Path


def size() -> int:
    """Return the bytes of address space that this process has."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()


def main() -> None:
    requests = map(json.loads, sys.stdin.buffer)
    setup = next(requests)
    sys.path[:] = setup["path"]
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

    limits = LLParserLimits(max_lexer_states=setup["states"], verbose_errors=False)

    tokens = LLTokenizer(setup["tokenizer"], eos_token=setup["eos"])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    print('[true, ""]', flush=True)
    for request in requests:
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:  # a process for each grammar: its memory is freed at its end
            os.close(sys.stdout.fileno())  # else the reader of stdout would wait for this process too
            signal.alarm(4 * setup["seconds"])
            before, began = size(), time.process_time()
            resource.setrlimit(resource.RLIMIT_AS, (before + setup["memory"],) * 2)
            resource.setrlimit(resource.RLIMIT_CPU, (setup["seconds"],) * 2)
            matcher = LLMatcher(tokens, request["grammar"], log_level=0, limits=limits)
            if not matcher.is_error():
                matcher.compute_bitmask()
            share = max((time.process_time() - began) / setup["seconds"], (size() - before) / setup["memory"])
            os.write(writing, (matcher.get_error() or f"{share:.4f}").encode()[:2000])
            os._exit(1 if matcher.is_error() else 0)
        os.close(writing)
        with os.fdopen(reading, "rb") as said:
            text = said.read().decode(errors="replace").partition("\n")[0]
        _, status = os.waitpid(child, 0)
        good = os.waitstatus_to_exitcode(status)
        costly = f"it takes over {setup['seconds']} s or {setup['memory'] >> 20} MB"
        print(json.dumps([good == 0, text if good in (0, 1) else costly]), flush=True)


if __name__ == "__main__":
    main()
