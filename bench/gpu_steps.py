"""Steps of a GPU run: each in its own process, within its own time, whatever became of the others.

A step that fails, hangs or lacks its tool leaves a line and a log; the next one goes on. What has
been found is on the disk after every step. Only the standard library is needed.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

OK, FAILED, TIMED_OUT, SKIPPED = "ok", "failed", "timed out", "skipped"
# From the request to stop, at which pytest still writes what it has, to the end by force.
GRACE = 8.0


@dataclass(frozen=True)
class Reading:
    """What a step's output says: its key figure, and what is wrong or why it could not be done."""

    figure: str = ""
    problem: str | None = None
    skip: str | None = None


@dataclass(frozen=True)
class Step:
    """One piece of work.

    commands(seconds): made for the time that it has, tried in turn until one succeeds.
    least, most: seconds that it is worth starting with, and that it may take. read(log): what the
    output, or a file that it has left, says. why_not: the reason to skip it, if there is one.
    weight: its share of the time beyond `least`, among steps that divide it. partial: when the time
    is up, what it has done by then is a result.
    """

    name: str
    commands: Callable[[float], Sequence[Sequence[str]]]
    least: float
    most: float
    read: Callable[[str], Reading] = lambda log: Reading()
    why_not: str | None = None
    weight: float = 1.0
    partial: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Result:
    """What became of a step."""

    name: str
    outcome: str
    seconds: float = 0.0
    limit: float = 0.0
    figure: str = ""
    reason: str = ""
    commands: list[str] = field(default_factory=list)

    @property
    def bad(self) -> bool:
        return self.outcome in (FAILED, TIMED_OUT)


class Stopped(BaseException):
    """The run was told to stop."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def divide(seconds: float, steps: Sequence[Step]) -> dict[str, float]:
    """Seconds for each step: its least, and of the rest a share by weight, up to its most.

    Earlier steps come first: where the time does not suffice for all, the last ones get none.
    """
    admitted: list[Step] = []
    left = seconds
    for step in steps:
        if step.least <= left:
            admitted.append(step)
            left -= step.least
    shares = {step.name: step.least for step in admitted}
    growing = [step for step in admitted if step.most > step.least]
    while growing and left > 1e-6:
        weight = sum(step.weight for step in growing)
        portions = {s.name: min(left * s.weight / weight, s.most - shares[s.name]) for s in growing}
        for name, portion in portions.items():
            shares[name] += portion
        left -= sum(portions.values())
        growing = [step for step in growing if step.most - shares[step.name] > 1e-6]
    return shares


@dataclass
class Runner:
    """Carries out steps one after the other and keeps `OUT/summary.json` up to date.

    out: where logs and results go. deadline: on `clock`, when the whole run should be over.
    """

    out: Path
    root: Path
    deadline: float
    facts: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=lambda: dict(os.environ))
    clock: Callable[[], float] = time.monotonic
    results: list[Result] = field(default_factory=list)

    @property
    def remaining(self) -> float:
        return self.deadline - self.clock()

    def limit(self, step: Step, later: Sequence[Step]) -> float:
        """Its most, or less so that each of the later ones still gets its least."""
        return min(step.most, self.remaining - sum(s.least for s in later if s.why_not is None))

    def carry_out(self, step: Step, limit: float, share: float | None = None) -> Result:
        """Run the step for at most `limit` seconds, and remember what became of it.

        Its commands are made for `share`, if that is what it should take.
        """
        start = self.clock()
        result = Result(step.name, FAILED, reason="stopped")
        try:
            result = self._result(step, limit, limit if share is None else share)
        except Exception as error:  # a damaged output must not end the run
            result = Result(step.name, FAILED, reason=f"{type(error).__name__}: {error}")
        finally:
            result.seconds, result.limit = self.clock() - start, max(0.0, limit)
            self.results.append(result)
            self.save()
            print(line(result), flush=True)
        return result

    def _result(self, step: Step, limit: float, share: float) -> Result:
        if step.why_not is not None:
            return Result(step.name, SKIPPED, reason=step.why_not)
        if limit < step.least / 2:
            return Result(step.name, SKIPPED, reason=f"only {max(0.0, limit):.0f} s were left")
        end = self.clock() + limit
        environment = self.environment | dict(step.environment)
        log = self.out / f"{step.name.replace(' ', '-')}.log"
        log.unlink(missing_ok=True)
        tried: list[str] = []
        status: int | None = None
        for command in step.commands(share):
            tried.append(shlex.join(command))
            status = execute(command, end - self.clock(), log, self.root, environment)
            if status in (0, None):
                break
        text = log.read_text(errors="replace")
        reading = step.read(text)
        found = {"figure": reading.figure, "commands": tried}
        if status is None and not step.partial:  # what it has written by then is told
            return Result(step.name, TIMED_OUT, reason=f"after: {last_line(text)}", **found)
        if status is None:
            words = [word for word in (reading.problem, "then its time was up") if word]
            return Result(
                step.name, FAILED if reading.problem else OK, reason="; ".join(words), **found
            )
        if reading.skip is not None:
            return Result(step.name, SKIPPED, reason=reading.skip, **found)
        problem = reading.problem or (f"exit status {status}: {last_line(text)}" if status else "")
        return Result(step.name, FAILED if problem else OK, reason=problem, **found)

    def save(self) -> None:
        """Write what is known by now."""
        ok = bool(self.results) and not any(result.bad for result in self.results)
        steps = [asdict(result) for result in self.results]
        write_json(self.out / "summary.json", self.facts | {"ok": ok, "steps": steps})
        (self.out / "summary.txt").write_text("\n".join(map(line, self.results)) + "\n")


def execute(
    command: Sequence[str], seconds: float, log: Path, cwd: Path, environment: Mapping[str, str]
) -> int | None:
    """The exit status, None if the time was up; all output is added to the log."""
    with log.open("a") as out:
        out.write(f"$ {shlex.join(command)}\n")
        out.flush()
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=cwd,
                env=dict(environment),
                start_new_session=True,  # a group of its own, to be ended as a whole
            )
        except OSError as error:
            out.write(f"{command[0]}: {error.strerror}\n")
            return 127
        try:
            return process.wait(max(0.0, seconds))
        except subprocess.TimeoutExpired:
            _end(process, GRACE)
            return None
        except BaseException:
            _end(process, grace=1.0)
            raise


def _end(process: subprocess.Popen[bytes], grace: float) -> None:
    """Ask the whole group to stop, and after a while make it."""
    for number, patience in ((signal.SIGINT, grace), (signal.SIGKILL, None)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)


def line(result: Result) -> str:
    """One row of the table: step, outcome, seconds, figure or reason."""
    outcome = result.outcome
    words = [word for word in (result.figure, result.reason) if word]
    return f"{result.name:<30} {outcome:<10} {result.seconds:>5.0f} s  {'; '.join(words)}".rstrip()


def last_line(text: str) -> str:
    """The last line that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no output"


def write_json(path: Path, content: Any) -> None:
    """Replace the file as a whole, so that whoever ends this run finds the old or the new one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, path)
