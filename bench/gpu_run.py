"""Rung 7 in one command: everything that wants a GPU, in ten minutes and without a network.

    bench/gpu_run.sh OUT [OP ...] [--dry-run] [--minutes 10]

Build, tests, truth, sanitizer, speed: each in a process of its own with its own time limit, so that
a crash, a hang, a missing tool or a GPU error costs one step and no other. What was found is in OUT
after every step: `machine.json`, `pytest.xml`, `check.json`, `records.json`, `report.html`, a log
for each step, and `summary.json`, `summary.txt`.

Run as `python -m bench.gpu_run` from the source tree, before bigops can be imported: this file and
its neighbours bench/gpu_*.py need only the standard library.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from . import gpu_results
from .gpu_plan import (
    LINKS,
    MODELS,
    PRIORITIES,
    PROBE,
    PYTHON,
    REPORT,
    REPORT_SECONDS,
    ROOT,
    bench_steps,
    build_steps,
    by_value,
    machine_step,
    proof_steps,
    rates_steps,
    scaled,
)
from .gpu_steps import OK, Result, Runner, Step, Stopped, divide, line, write_json

OURS = ("*.log", "*.json", "*.xml", "*.html", "*.txt", "*.partial")
NAME = "bigops gpu_run"


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="gpu_run", description=(__doc__ or "").split("\n\n", 1)[0])
    add = parser.add_argument
    add("out", metavar="OUT", type=Path, help="a folder: new, empty, or of an earlier run")
    add("ops", metavar="OP", nargs="*", help="only these ops and models (CNN, Transformer)")
    add("--minutes", type=float, default=10.0, help="for everything (default: %(default)g)")
    add("--dry-run", action="store_true", help="say what would be done; write nothing")
    add("--no-build", action="store_true", help="take the bigops that can be imported")
    add("--device", default="cuda", choices=("cuda", "cpu"), help="cpu tries this command itself")
    args = parser.parse_args(words)
    if not 0.0 < args.minutes <= 600.0:
        parser.error(f"--minutes must be above 0 and at most 600, got {args.minutes:g}")
    if problem := unusable(args.out):
        parser.error(f"OUT: {args.out}: {problem}")
    return args


def unusable(out: Path) -> str | None:
    """Why OUT cannot be written, or is somebody else's."""
    if out.is_dir():
        if any(out.iterdir()) and not _earlier_run(out / "summary.json"):
            return "is neither empty nor of an earlier run"
        return None if os.access(out, os.W_OK) else "cannot be written"
    if out.exists():
        return "is not a folder"
    above = next(parent for parent in out.absolute().parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        return f"{above} cannot be written"
    return None


def _earlier_run(summary: Path) -> bool:
    try:
        return gpu_results.load(summary, {"run": str})["run"] == NAME
    except gpu_results.Damaged:
        return False


def clean(out: Path) -> None:
    """An empty OUT: what an earlier run has left must not be taken for this one's."""
    out.mkdir(parents=True, exist_ok=True)
    for pattern in OURS:
        for path in out.glob(pattern):
            path.unlink()
    shutil.rmtree(out / "bench", ignore_errors=True)
    (out / "bench").mkdir()


def link_package(folder: Path) -> None:
    """Make `folder` one from which bigops can be imported without being installed.

    As pyproject.toml's package-dir has it: everything of bigops/, with what lies beside it inside.
    What is there already stays.
    """
    package = folder / "bigops"
    package.mkdir(parents=True, exist_ok=True)
    beside = [ROOT / name for name in ("kernels", "bench", "csrc")]
    for path in [*(ROOT / "bigops").iterdir(), *beside]:
        link = package / path.name
        if path.name != "__pycache__" and not link.exists():
            link.symlink_to(path)


def child_environment() -> dict[str, str]:
    """What every step gets. PYTHONSAFEPATH: `import bigops` must not find the source folder, which
    has neither kernels nor bench inside."""
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    kept = os.pathsep.join(path for path in paths if path and Path(path).resolve() != ROOT)
    changes = {"PYTHONPATH": kept, "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}
    # Beside the build, so that a second run on the same checkout compiles nothing again.
    cache = {"TRITON_CACHE_DIR": str(ROOT / "build" / "triton")}
    return cache | dict(os.environ) | changes


class GpuRun:
    """The run as a whole."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.out = args, args.out.resolve()
        self.seconds = 60.0 * args.minutes
        facts = {
            "run": NAME,
            "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "device": args.device,
            "minutes": args.minutes,
        }
        deadline = time.monotonic() + self.seconds
        self.runner = Runner(self.out, ROOT, deadline, facts, child_environment())

    def carry_out(self) -> int:
        """0 when nothing failed, else 1; 128 + the signal's number when stopped by one."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _stop)
        try:
            clean(self.out)
            self.runner.save()
        except OSError as error:
            print(f"gpu_run: OUT: {self.out}: {error.strerror}", file=sys.stderr)
            return 2
        status = 0
        try:
            self._steps()
        except Stopped as stop:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)
            status = 128 + stop.number
            self.runner.facts["stopped"] = signal.Signals(stop.number).name
        self._report()
        results = self.runner.results
        print(f"\n{self.out}:", *map(line, results), sep="\n")
        return status or int(any(result.bad for result in results))

    def _steps(self) -> None:
        args = self.args
        machine, build, probe = self._first_steps()
        blocked = "see machine" if self._step(machine).bad else None
        if not self._importable(build, probe, blocked):
            blocked = blocked or "see import"
        found: dict[str, Any] = {}
        if not blocked:
            log = (self.out / "import.log").read_text()
            found["import"] = json.loads(log.strip().splitlines()[-1])
            found["machine"] = gpu_results.load(self.out / "machine.json", {})
        proofs = scaled(self._proofs(found), args.minutes)
        proofs = by_value(proofs, self.runner.remaining - self._for_speed)
        bench = Step("bench", lambda seconds: [], self._for_speed, 0.0, why_not=blocked)
        for i, step in enumerate(proofs):
            self._step(step, blocked, [*proofs[i + 1 :], bench])
        if blocked:
            self._step(bench)
        else:
            samples = found["import"]["samples"]
            self._bench(bench_steps(self.out, args.device, args.ops, samples))

    @property
    def _for_speed(self) -> float:
        """What benchmarks and report get, if proving the kernels right leaves no more."""
        return REPORT_SECONDS + 0.3 * self.seconds

    def _importable(self, build: Step, probe: Step, blocked: str | None) -> bool:
        """Build, and import what was built: as pip has installed it, or else through links."""
        if blocked or build.why_not:
            self._step(build, blocked)
            return self._step(probe, blocked).outcome == OK
        shutil.rmtree(LINKS, ignore_errors=True)
        link_package(LINKS)
        built = self._step(build)
        by_pip = built.outcome == OK and len(built.commands) == 1
        if by_pip and self._step(probe).outcome == OK:
            return True
        link_package(LINKS)  # what was built meanwhile
        environment = self.runner.environment
        paths = filter(None, [str(LINKS), environment["PYTHONPATH"]])
        environment["PYTHONPATH"] = os.pathsep.join(paths)
        with (self.out / "build.log").open("a") as log:
            log.write(f"bigops as pip installs it is not to be had: imported from {LINKS}\n")
        return self._step(probe).outcome == OK

    def _proofs(self, found: Mapping[str, Any]) -> list[Step]:
        of_run = self.out, self.args.device, self.args.ops, found
        return [*proof_steps(*of_run), *rates_steps(*of_run)]

    def _first_steps(self) -> list[Step]:
        args = self.args
        return [machine_step(self.out, args.device), *build_steps(args.no_build, args.ops)]

    def _step(self, step: Step, blocked: str | None = None, later: Sequence[Step] = ()) -> Result:
        step = replace(step, why_not=step.why_not or blocked)
        return self.runner.carry_out(step, self.runner.limit(step, later))

    def _bench(self, benches: Sequence[Step]) -> None:
        paths = [self.out / "bench" / f"{step.name.split()[1]}.json" for step in benches]
        for i, step in enumerate(benches):
            left = self.runner.remaining - REPORT_SECONDS
            shares = divide(left, benches[i:])
            others = sum(s.least for s in benches[i + 1 :] if s.name in shares)
            # One that takes longer than planned may have the others' slack, but not their least.
            share = shares.get(step.name, 0.0)
            self.runner.carry_out(step, max(share, left - others) if share else 0.0, share)
            merged, damaged = gpu_results.merge(path for path in paths if path.exists())
            bad = [result for result in self.runner.results if result.bad]
            lost = [line(r) for r in bad if r.name.startswith("bench ")]
            merged["failed"] += damaged + lost
            if "cpu" in merged["machine"]:  # else there is nothing to report on
                write_json(self.out / "records.json", merged)

    def _report(self) -> None:
        self.runner.facts["seconds"] = round(self.seconds - self.runner.remaining, 1)
        records, target = self.out / "records.json", self.out / "report.html"
        command = [PYTHON, "-c", REPORT, str(records), str(target)]
        why_not = None if records.is_file() else "nothing was measured"
        step = Step("report", lambda seconds: [command], 1, 2 * REPORT_SECONDS, why_not=why_not)
        self.runner.carry_out(step, step.most)

    def dry(self) -> int:
        """Print each step with its share of the time, the most that it may take, its command."""
        found = _probe()
        args = self.args
        proofs = self._proofs({"import": found})
        first = self._first_steps()
        left = self.seconds - self._for_speed - sum(step.least for step in first)
        steps = [*first, *by_value(scaled(proofs, args.minutes), left)]
        benches = bench_steps(self.out, args.device, args.ops, found["samples"])
        todo = [step for step in [*steps, *benches] if step.why_not is None]
        shares = divide(self.seconds - REPORT_SECONDS, todo)
        print(f"{self.seconds:.0f} s, device {args.device}, results in {self.out}")
        for step in [*steps, *benches]:
            share = shares.get(step.name)
            reason = step.why_not or (None if share else "no time for it")
            if reason:
                print(f"{step.name:<30} skipped: {reason}")
                continue
            rest = sum(other.least for other in todo if other is not step)
            most = max(share, min(step.most, self.seconds - REPORT_SECONDS - rest))
            print(f"{step.name:<30} about {share:.0f} s, at most {most:.0f} s")
            for command in step.commands(share):
                print(f"    {shlex.join(command)}")
        print(f"{'report':<30} about {REPORT_SECONDS:.0f} s")
        return 0


def _probe() -> dict[str, Any]:
    """What the import step would tell, as far as it can be told without building."""
    done = subprocess.run(
        [PYTHON, "-c", PROBE], capture_output=True, text=True, env=child_environment(), cwd=ROOT
    )
    if done.returncode == 0:
        return dict(json.loads(done.stdout.strip().splitlines()[-1]))
    print("bigops cannot be imported before it is built: ops and samples are as usual")
    return {"samples": {name: 4 for name in PRIORITIES if name not in MODELS}}


def _stop(number: int, frame: object) -> NoReturn:
    raise Stopped(number)


def main(words: Sequence[str] | None = None) -> int:
    run = GpuRun(arguments(words))
    return run.dry() if run.args.dry_run else run.carry_out()


if __name__ == "__main__":
    sys.exit(main())
