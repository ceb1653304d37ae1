"""Chat templates run in a process of their own, which may take so much time and memory and no more.

A template is a program that came with a model. Jinja's sandbox keeps it from files and code, not
from loops without end or texts of gigabytes, and a thread or a process that trains can be freed of
neither: `'a' * 10**10` is one step of C. So each render has two seconds of CPU time, after which
the kernel ends this process (`ITIMER_PROF`), and an address space with a bound.

Run as a module it is that process: requests are pickles of plain values by a parent that trusts
itself, answers are JSON.
"""

import functools
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from toolkit.config.secrets import is_secret_name

RENDER_SECONDS = 2.0
"""CPU time of one render."""
MAX_OUTPUT_BYTES = 10_000_000
"""UTF-8 bytes of one rendered text."""
MEMORY_BYTES = 1 << 30
"""What templates may take beyond what the process has when it starts."""


class TemplateError(Exception):
    """The template failed, or did not stay within its limits; `line` is that of a syntax error."""

    def __init__(self, reason: str, line: int | None = None) -> None:
        super().__init__(reason)
        self.line = line


def render(request: dict[str, Any]) -> tuple[str, list[tuple[int, int]]]:
    """The text and the marked parts of one conversation; any thread may call it. TemplateError,
    with one line, where the template fails. `request` are the arguments of `transformers`'
    `render_jinja_template`, with one conversation."""
    return _process().render(request)


@functools.cache
def _process() -> "_TemplateProcess":
    return _TemplateProcess()


class _TemplateProcess:
    """Started at the first render, and again after a template made it end."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._owner = os.getpid()

    def render(self, request: dict[str, Any]) -> tuple[str, list[tuple[int, int]]]:
        with self._lock:
            if self._child is None or self._owner != os.getpid() or self._child.poll() is not None:
                self._child, self._owner = _start(), os.getpid()
            child = self._child
            try:
                reply = _ask(child, request)
            except BaseException as error:
                # Also Ctrl-C: the answer must not be taken for that of the next row.
                self._child = None
                child.kill()
                if not isinstance(error, BrokenPipeError):
                    raise
                reply = b""
            if not reply.endswith(b"\n"):
                self._child = None
                raise TemplateError(_why_it_ended(child.wait()))
        answer = json.loads(reply)
        if "error" in answer:
            raise TemplateError(answer["error"], answer["line"])
        return answer["text"], [(start, end) for start, end in answer["marks"]]


def _ask(child: subprocess.Popen[bytes], request: dict[str, Any]) -> bytes:
    """The line that answers; not a whole one where the process ended."""
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(pickle.dumps(request))
    child.stdin.flush()
    return child.stdout.readline()


def _start() -> subprocess.Popen[bytes]:
    import toolkit

    root = str(Path(toolkit.__file__).parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [sys.executable, "-P", "-m", __name__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        # Should a template ever break out of its sandbox, it finds no secrets.
        env={k: v for k, v in os.environ.items() if not is_secret_name(k)} | {"PYTHONPATH": path},
        # Ctrl-C in a terminal reaches all processes of the group; this one ends with its parent.
        start_new_session=True,
    )


def _why_it_ended(code: int) -> str:
    if code == -signal.SIGPROF:
        return f"it takes more than {RENDER_SECONDS:g} s"
    return f"the process that runs it ended with code {code} (memory is short, or it crashed)"


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    from jinja2 import TemplateSyntaxError
    from transformers.utils.chat_template_utils import render_jinja_template

    # Its annotations tell only a part of what it takes and gives.
    run: Any = render_jinja_template
    signal.setitimer(signal.ITIMER_PROF, RENDER_SECONDS)
    try:
        texts, marks = run(**request)
        text = texts[0]
        if len(text) > MAX_OUTPUT_BYTES or len(text.encode("utf-8", "replace")) > MAX_OUTPUT_BYTES:
            megabytes = MAX_OUTPUT_BYTES / 1e6
            return {"error": f"it writes more than {megabytes:g} MB", "line": None}
        return {"text": text, "marks": marks[0] if marks else []}
    except TemplateSyntaxError as error:
        return {"error": str(error.message), "line": error.lineno}
    except MemoryError:
        return {"error": f"it takes more than {MEMORY_BYTES >> 20} MB of memory", "line": None}
    except RecursionError:
        return {"error": "it calls itself without end", "line": None}
    except Exception as error:  # a template is a program: it can fail in any way
        lines = str(error).strip().splitlines()
        return {"error": lines[0][:500] if lines else type(error).__name__, "line": None}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _limit_memory() -> None:
    import resource

    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:
        return  # not Linux, which counts an address space in its own way
    limit = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY_BYTES
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hard == resource.RLIM_INFINITY or limit < hard:
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def _serve() -> None:
    # Whatever is printed here must not get between the answers.
    stdin, stdout = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    import jinja2
    import transformers.utils.chat_template_utils  # noqa: F401

    del jinja2
    _limit_memory()
    while True:
        try:
            request = pickle.load(stdin)
        except EOFError:
            return
        stdout.write(json.dumps(_answer(request)).encode() + b"\n")
        stdout.flush()


if __name__ == "__main__":
    _serve()
