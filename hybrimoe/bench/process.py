"""A measured process: started with a command, asked with one JSON object a line, answering likewise."""

from __future__ import annotations

import contextlib
import json
import subprocess
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from hybrimoe.errors import HybrimoeError

__all__ = ["WorkerFailedError", "WorkerProcess"]


class WorkerFailedError(HybrimoeError):
    """A measured process ended, hung, or could not do what it was asked for: `reason`. Its exit code is the process's
    own where that said one."""

    def __init__(self, name: str, reason: str, hint: str = "", exit_code: int = 1) -> None:
        super().__init__(f"the row '{name}' failed: {reason}", hint)
        self.reason = reason
        self.exit_code = exit_code


class WorkerProcess:
    """A running worker; its first reply is `ready`. `give_up_s` ends one that does not answer (a hung driver).

    Raises WorkerFailedError when it ends instead of answering.
    """

    def __init__(
        self, name: str, command: Sequence[str], environment: Mapping[str, str], give_up_s: float = 900.0
    ) -> None:
        self.name = name
        self._give_up_s = give_up_s
        # A session of its own: a terminal's Ctrl-C is for us, who end it, not for a Python that is just starting.
        self._process = subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=dict(environment),
            text=True,
            start_new_session=True,
        )
        try:
            self.ready = self._read()
        except BaseException:
            self.close()
            raise

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # reading tells how it ended
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        timer = threading.Timer(self._give_up_s, self._process.kill)
        timer.daemon = True  # an interrupted start may leave it behind
        try:
            timer.start()
            line = self._process.stdout.readline()
        except BaseException:
            self._process.kill()  # nobody wants the answer that it is at any more
            raise
        finally:
            timer.cancel()
        if not line:
            status = self._process.wait()
            raise WorkerFailedError(self.name, f"its process ended with status {status}", "see its messages above")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise WorkerFailedError(
                self.name, str(reply["error"]), str(reply.get("hint", "")), int(reply.get("exit_code", 1))
            )
        return reply

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            if self._process.stdin is not None:
                self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
