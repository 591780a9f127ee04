"""Worker processes that compare formulas, each item under a hard deadline and a cap of memory.

A worker is a plain subprocess spoken to in lines of JSON. Unlike a `multiprocessing` worker it may be started from any
process or thread (daemonic ones, too), imports nothing of the program's main module, and what it answers cannot be
anything but text. POSIX only. One that hangs, dies or eats memory is killed and the next item gets a fresh one.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import selectors
import subprocess
import sys
import threading
import time

from rl_lora.rewards.score import RewardError, Unscorable

START_SECONDS = 120.0
"""A worker that has not imported its libraries by then is given up (sympy takes a second, more on a busy machine)."""
MEMORY_MB = 1024
"""Address space of one worker; about 250 MB of it are libraries."""
MAX_WORKERS = min(4, os.cpu_count() or 1)

_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from rl_lora.rewards.math.workers import serve; serve()"
)


class Worker:
    """One subprocess. Not thread-safe: the pool gives it to one caller at a time."""

    def __init__(self) -> None:
        path = [os.path.abspath(entry) for entry in sys.path if isinstance(entry, str)]
        command = [sys.executable, "-P", "-c", _START, json.dumps(path), str(MEMORY_MB)]
        pipe = subprocess.PIPE
        try:
            self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, bufsize=0)
        except OSError as error:  # out of memory, processes or file descriptors
            raise Unscorable(f"a worker of the math verifier could not be started: {error}") from error
        self.buffer = b""
        try:
            hello = self._line(START_SECONDS)
        except (TimeoutError, EOFError) as error:
            self.kill()
            raise Unscorable(f"a worker of the math verifier did not start: {error}") from error
        except BaseException:
            self.kill()
            raise
        if hello != {"ready": True}:
            self.kill()
            raise RewardError(f"the math verifier cannot start a worker: {hello.get('failed', hello)}")

    def ask(self, item: dict[str, object], seconds: float) -> dict[str, str]:
        """The worker's answer. Raises TimeoutError or EOFError, after which the worker must be killed."""
        assert self.process.stdin is not None
        line = json.dumps({**item, "seconds": seconds}).encode() + b"\n"  # ASCII; below the size of a pipe's buffer
        try:
            self.process.stdin.write(line)
        except BrokenPipeError as error:
            raise EOFError("its worker had died") from error
        return self._line(seconds)

    def _line(self, seconds: float) -> dict[str, str]:
        assert self.process.stdout is not None
        deadline = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while b"\n" not in self.buffer:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise TimeoutError(f"no verdict within {seconds:g} s")
                data = os.read(self.process.stdout.fileno(), 65536)
                if not data:
                    raise EOFError(f"its worker died (exit status {self._exit_status()})")
                self.buffer += data
        line, _, self.buffer = self.buffer.partition(b"\n")
        answer: dict[str, str] = json.loads(line)
        return answer

    def _exit_status(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(1.0)
        return None

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.close_pipes()

    def close_pipes(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


class Pool:
    """Up to `MAX_WORKERS` workers, started when first needed; further callers wait for their turn."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.slots = threading.BoundedSemaphore(MAX_WORKERS)
        self.idle: list[Worker] = []
        self.all: set[Worker] = set()

    def ask(self, item: dict[str, object], seconds: float) -> dict[str, str]:
        """One item, answered within `seconds` (waiting for a turn and starting a worker not counted).

        Raises:
            Unscorable: the deadline passed, or the worker died or ran out of memory; it has been replaced.
        """
        with self.slots:
            worker = self._take()
            try:
                answer = worker.ask(item, seconds)
            except (TimeoutError, EOFError) as error:
                self._drop(worker)
                raise Unscorable(f"the math verifier gave up: {error}") from error
            except BaseException:  # also KeyboardInterrupt: the answer that is still to come belongs to nobody
                self._drop(worker)
                raise
            if answer.get("outcome") == "memory":
                self._drop(worker)
                raise Unscorable(f"the math verifier gave up: more than {MEMORY_MB} MB of memory")
            with self.lock:
                self.idle.append(worker)
            return answer

    def _take(self) -> Worker:
        with self.lock:
            while self.idle:
                worker = self.idle.pop()
                if worker.process.poll() is None:
                    return worker
                self.all.discard(worker)
                worker.close_pipes()
        worker = Worker()
        with self.lock:
            self.all.add(worker)
        return worker

    def _drop(self, worker: Worker) -> None:
        with self.lock:
            self.all.discard(worker)
        worker.kill()

    def close(self) -> None:
        """Kill every worker. The pool may be used again, and starts new ones."""
        with self.lock:
            workers, self.all, self.idle = list(self.all), set(), []
        for worker in workers:
            worker.kill()


_pool = Pool()


def ask(item: dict[str, object], seconds: float) -> dict[str, str]:
    """`Pool.ask` of this process's pool."""
    return _pool.ask(item, seconds)


def close() -> None:
    """End this process's workers; the next item starts new ones."""
    _pool.close()


def _after_fork_in_child() -> None:
    """A forked child has its parent's pipes, and maybe locks that nobody will release: it starts afresh. It closes its
    copies of the pipes, without which the workers would outlive the parent, and leaves the parent's workers alone."""
    global _pool
    for worker in tuple(_pool.all):
        worker.close_pipes()
        worker.process.returncode = 0  # not this process's child: nothing to wait for
    _pool = Pool()


atexit.register(close)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


# ---- inside the worker ------------------------------------------------------------------------------------------


def serve() -> None:
    """The worker's loop: a line in, a line out, until its input ends with the process that asks."""
    import resource
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the program, which ends us
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # whatever a library prints is no verdict

    def reply(answer: dict[str, object]) -> None:
        replies.write(json.dumps(answer).encode() + b"\n")

    try:
        from rl_lora.rewards.math.compare import compare
        from rl_lora.rewards.math.symbolic import warm_up

        warm_up()
    except Exception as error:
        reply({"failed": f"{type(error).__name__}: {error}"})
        return
    limit = int(sys.argv[2]) * 2**20
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    reply({"ready": True})
    for line in sys.stdin.buffer:
        item = json.loads(line)
        # The default action of SIGALRM ends a process even in the middle of C code: the deadline holds when the
        # program that should kill us is itself dead.
        signal.setitimer(signal.ITIMER_REAL, item["seconds"] + 1.0)
        try:
            outcome = compare(item["answer"], item["reference"])
        except MemoryError:
            outcome = "memory"
        except Exception as error:
            outcome = f"{type(error).__name__}: {error}"
        signal.setitimer(signal.ITIMER_REAL, 0)
        reply({"outcome": outcome})
