"""Jobs for tests that kill processes or let several work together: each is a fork of one process, and begins at once.

That process has imported what the jobs need, which takes ten seconds, and started no thread.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests import ROOT


class ForkServer:
    """The process, and what talks to it.

    Args:
        folder: The home of Hugging Face's libraries there, so that nothing of the user's is read.
    """

    def __init__(self, folder: Path) -> None:
        # Sums depend on the number of threads in their last digits, and launchers set it to one for several processes.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(folder)}
        command = [sys.executable, "-m", "tests.fork_server"]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, text=True)

    def run(self, job: Callable[..., Any], *arguments: object) -> Any:
        """What a function of a module returns in a fork, by way of JSON; its arguments arrive as texts."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = [job.__module__, job.__qualname__, [str(argument) for argument in arguments]]
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        code, written, result = json.loads(self._process.stdout.readline())
        assert code == 0, written
        return result

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def fork(job: Callable[[], None]) -> int:
    """Runs `job` in a child; returns its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        job()
        code = 0
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(child: int) -> int:
    """The exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    gc.disable()  # as in `tests.conftest`: imports make little garbage
    importlib.import_module("tests.forked")
    gc.enable()
    with tempfile.TemporaryDirectory() as folder:
        written, result = Path(folder, "written"), Path(folder, "result")
        for request in sys.stdin:
            result.write_text("null")
            code = wait(fork(lambda request=request: _do(*json.loads(request), written, result)))
            answers.write(json.dumps([code, written.read_text(), json.loads(result.read_text())]) + "\n")
            answers.flush()


def _do(module: str, function: str, arguments: list[str], written: Path, result: Path) -> None:
    with written.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    result.write_text(json.dumps(getattr(importlib.import_module(module), function)(*arguments)))


if __name__ == "__main__":
    _serve()
