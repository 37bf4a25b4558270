"""Compiling in processes of the ledger's own, two at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from queue import SimpleQueue
from tempfile import TemporaryFile
from typing import Any

from ..backends import triton
from ..ops import Op
from .architectures import ARCHITECTURES
from .entries import Entry, entry
from .launches import Launch

WORKERS = 2


class LedgerError(RuntimeError):
    """A kernel that cannot be compiled here, and why."""


class Worker:
    """A process that plans and compiles."""

    def __init__(self) -> None:
        if not triton.INSTALLED:
            raise LedgerError("compiling needs triton, which is not installed")
        left_out = ("TRITON_INTERPRET", "BIGOPS_BACKEND", "BIGOPS_STRICT")
        environment = {k: v for k, v in os.environ.items() if k not in left_out}
        # What this process can import, an op's own module among it.
        environment["PYTHONPATH"] = os.pathsep.join(p or os.getcwd() for p in sys.path)
        self._errors = TemporaryFile("w+")  # noqa: SIM115  (closed with the process)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bigops.ledger"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment,
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exc: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._errors.close()

    def ask(self, do: str, **request: Any) -> Any:
        """The answer to a request; LedgerError with the reason when there is none."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(json.dumps({"do": do, **request}), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise LedgerError(self._last_words()) from None
        line = self._process.stdout.readline()
        if not line:
            raise LedgerError(self._last_words())
        answer = json.loads(line)
        if "error" in answer:
            raise LedgerError(answer["error"])
        return answer["answer"]

    def _last_words(self) -> str:
        self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines() or ["no message"]
        return f"the compiling process ended ({self._process.returncode}): {lines[-1]}"


def plan(ops: Sequence[Op], targets: Sequence[str] = tuple(ARCHITECTURES)) -> list[Launch]:
    """What the calls of `ops` launch on `targets`."""
    modules = list(dict.fromkeys(op.function.__module__ for op in ops))
    names = [op.name for op in ops]
    with Worker() as worker:
        found = worker.ask("plan", modules=modules, ops=names, targets=list(targets))
    return [Launch(**launch) for launch in found]


def compile_all(
    launches: Sequence[Launch], done: Callable[[Launch], None] = lambda launch: None
) -> list[Entry]:
    """The entries of the launches, in their order; `done` is called after each compilation."""

    def figures(worker: Worker, launch: Launch) -> Entry:
        found = worker.ask("compile", launch=asdict(launch), text=None)
        done(launch)
        return entry({**asdict(launch), **found})

    return list(_shared_out(launches, figures))


def code(launches: Sequence[Launch], text: str) -> Iterator[str]:
    """The machine code ("sass") or what it was made of ("ptx") of each launch."""
    return _shared_out(
        launches, lambda worker, launch: worker.ask("compile", launch=asdict(launch), text=text)
    )


def _shared_out(launches: Sequence[Launch], work: Callable[[Worker, Launch], Any]) -> Iterator[Any]:
    if not launches:
        return
    with ExitStack() as stack:
        idle: SimpleQueue[Worker] = SimpleQueue()
        for _ in range(min(WORKERS, len(launches))):
            idle.put(stack.enter_context(Worker()))

        def one(launch: Launch) -> Any:
            worker = idle.get()
            try:
                return work(worker, launch)
            except LedgerError as error:
                where = f"{launch.kernel} ({launch.op}: {launch.call}, {launch.dtype})"
                raise LedgerError(f"{where} on {launch.target}: {error}") from None
            finally:
                idle.put(worker)

        pool = stack.enter_context(ThreadPoolExecutor(WORKERS))
        try:
            yield from pool.map(one, launches)
        finally:
            pool.shutdown(cancel_futures=True)
