"""The processes that render one checkpoint's chat templates: started when needed, kept for what comes next.

Each runs render.py and talks over a socket of its own, a JSON line for a job and one for the reply. The socket is also
what ends it with us, however we end: there is nothing more to read. (Linux's PR_SET_PDEATHSIG would not do: it fires
when the thread that started the process ends.)
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fp4rt.errors import Fp4rtError

MAX_PROCESSES = 4  # as many threads as render at once; others wait for their turn


@dataclass(frozen=True)
class Limits:
    """What one job may take. wall_seconds: for a process that waits, which it never should."""

    cpu_seconds: int
    wall_seconds: float
    memory_bytes: int  # address space of the process
    max_text: int      # characters


class _Ended(Exception):
    """A process did not reply: it has ended, or is late."""


class _Process:
    """One process, for one thread at a time. used: whether it has replied before."""

    def __init__(self, opening: bytes):
        self._socket, theirs = socket.socketpair()
        try:
            with theirs:
                self._child = subprocess.Popen(
                    [sys.executable, "-I", "-S", "-W", "ignore", str(Path(__file__).with_name("render.py"))],
                    stdin=theirs, stdout=theirs, stderr=subprocess.PIPE)
        except BaseException:
            self._socket.close()
            raise
        self._opening = opening
        self.used = False

    def ask(self, job: bytes, seconds: float, most: int) -> bytes:
        """The reply, of `most` bytes, to a job. Raises TimeoutError after so many seconds, _Ended where none comes."""
        deadline = time.monotonic() + seconds
        reply = bytearray()
        try:
            self._socket.settimeout(seconds)
            self._socket.sendall(self._opening + job, socket.MSG_NOSIGNAL)  # an owner may let SIGPIPE end it
            self._opening = b""
            while not reply.endswith(b"\n"):
                self._socket.settimeout(max(deadline - time.monotonic(), 1e-3))
                piece = self._socket.recv(1 << 16)
                reply += piece
                if not piece or len(reply) > most:
                    raise _Ended
        except TimeoutError:
            raise
        except OSError:
            raise _Ended from None
        self.used = True
        return bytes(reply)

    def kill(self) -> int:
        """End the process and wait for it; its return code. A thread that waits in `ask` then raises _Ended."""
        self._child.kill()
        return self._child.wait()

    def last_words(self) -> str:
        """The last line that a process, ended now, wrote to stderr."""
        return self._child.stderr.read().decode(errors="replace").strip().rsplit("\n", 1)[-1][:200]

    def close(self) -> None:
        """Give the file descriptors back."""
        self._socket.close()
        self._child.stderr.close()

    def disown(self) -> None:
        """In a fork of its owner: close what was inherited, and do not wait for a process that is no child here."""
        self._child.returncode = 0
        self.close()


class RenderPool:
    """Up to MAX_PROCESSES processes over the same templates; any thread may `run` a job.

    file: what errors name. templates: their text by name. A process that exceeds its limits, dies or reports that a
    template is broken is not used again. A forked copy of this process starts its own.
    """

    def __init__(self, file: str, templates: dict[str, str], limits: Limits):
        self._file, self._templates, self._limits = file, templates, limits
        self._most = 12 * max(limits.max_text, sum(map(len, templates.values()))) + (1 << 16)  # JSON's \ud83d\ude42
        self._processes: set[_Process] = set()
        self._idle: list[_Process] = []
        self._closed = False
        self._make_locks()
        self._finalizer = weakref.finalize(self, _end_all, self._processes, self._idle)  # dropped, or at exit
        _pools.add(self)

    def run(self, job: dict[str, Any]) -> dict[str, Any]:
        """What render.py replies to a job. Raises Fp4rtError: "request" for data that is not plain or what the template
        refuses, "checkpoint" where it fails or exceeds its limits, "device" where no process starts.
        """
        try:
            line = json.dumps(job).encode() + b"\n"
        except (TypeError, ValueError, RecursionError) as error:
            raise Fp4rtError("request", f"the messages are not plain data ({error})") from None
        with self._turns:
            try:
                reply = self._ask(self._take(), line)
            except _Ended:  # one that was used before: killed in the meantime, or by what earlier jobs have left in it
                reply = self._ask(self._start(), line)
        if "error" in reply:
            raise Fp4rtError(reply["kind"], f"{self._file}: {reply['error']}")
        return reply

    def close(self) -> None:
        """End all processes, those that render too. Closing twice is fine."""
        with self._lock:
            self._closed = True
        self._finalizer()

    def _make_locks(self) -> None:
        self._lock = threading.Lock()  # of the fields
        self._turns = threading.BoundedSemaphore(MAX_PROCESSES)

    def _take(self) -> _Process:
        with self._lock:
            if self._closed:
                raise self._is_closed()
            if self._idle:
                return self._idle.pop()
        return self._start()

    def _start(self) -> _Process:
        opening = {"path": [entry for entry in sys.path if entry], "templates": self._templates, **asdict(self._limits)}
        try:
            process = _Process(json.dumps(opening).encode() + b"\n")
        except OSError as error:
            raise Fp4rtError("device", f"the chat template needs a process of its own, and {sys.executable!r} does not "
                                       f"start ({error.strerror})") from None
        with self._lock:
            if not self._closed:
                self._processes.add(process)
                return process
        process.kill()
        process.close()
        raise self._is_closed()

    def _ask(self, process: _Process, line: bytes) -> dict[str, Any]:
        """The reply of a process, which is used no more where there is none.

        Raises Fp4rtError where the job is to blame, _Ended where another process may do better.
        """
        keep = False
        try:
            reply = json.loads(process.ask(line, self._limits.wall_seconds, self._most))
            keep = reply.get("kind") != "checkpoint"
            return reply
        except TimeoutError:
            raise Fp4rtError("checkpoint", f"{self._file}: did not finish within {self._limits.wall_seconds} "
                                           "s") from None
        except _Ended:
            code = process.kill()
            if self._closed:
                raise self._is_closed() from None
            if code == -signal.SIGXCPU:
                raise Fp4rtError("checkpoint", f"{self._file}: the chat template takes more than "
                                               f"{self._limits.cpu_seconds} s of processor time") from None
            if not process.used:
                raise Fp4rtError("checkpoint", f"{self._file}: the chat template could not be rendered (its process "
                                               f"ended with {code}: {process.last_words()})") from None
            raise
        finally:
            self._put_back(process, keep)

    def _put_back(self, process: _Process, keep: bool) -> None:
        with self._lock:
            keep = keep and not self._closed
            if keep:
                self._idle.append(process)
            else:
                self._processes.discard(process)
        if not keep:
            process.kill()
            process.close()

    def _is_closed(self) -> Fp4rtError:
        return Fp4rtError("request", f"{self._file}: its Text is closed and renders no more")

    def _after_fork(self) -> None:
        for process in self._processes:
            process.disown()
        self._processes.clear()
        self._idle.clear()
        self._make_locks()


def _end_all(processes: set[_Process], idle: list[_Process]) -> None:
    for process in list(processes):
        process.kill()  # a thread that waits for one sees its end, and closes it
    while idle:
        idle.pop().close()
    processes.clear()


def _after_fork() -> None:
    for pool in _pools:
        pool._after_fork()


_pools: weakref.WeakSet[RenderPool] = weakref.WeakSet()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
