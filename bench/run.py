"""A whole run: ceilings, every case, call overhead, and the twins' training; one dictionary.

`--quick` fits two cores and four minutes: fewer seconds a case, a smaller Transformer, float32
(bfloat16 where the processor multiplies it), memory not measured, and torch.compile (seconds a
shape) only while its share of the time lasts; what was left out is said in the notes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from bigops.backends import native
from bigops.bench import machine, peers
from bigops.bench.cases import DTYPES, Case, OpCase, dtype_name
from bigops.bench.ceilings import Ceilings
from bigops.bench.compare import Key, key
from bigops.bench.models import ModelCase, cnn, model_cases, resnet18, transformer
from bigops.bench.optimizers import STEPS
from bigops.bench.overhead import overhead
from bigops.bench.peers.adapter import NOT_INSTALLED, first_line
from bigops.bench.records import GRAPH, Effort, Record, failing, measure
from bigops.bench.sweeps import Sweep, parse
from bigops.bench.tables import subject
from bigops.ops import BackendError, Op, Sample, get, table


@dataclass(frozen=True)
class Plan:
    """What to run.

    ops: names, all by default; none at all without with_ops. models: the reference models to run.
    case: only the cases of this name, or if there is none, those whose name contains it.
    sweeps: measured instead of the ops' cases. seconds: per case, beside its first calls.
    compile_seconds: in all, for torch.compile; 0 leaves it out.
    """

    ops: tuple[str, ...] = ()
    with_ops: bool = True
    models: tuple[str, ...] = ("CNN", "ResNet18", "Transformer")
    case: str = ""
    sweeps: tuple[Sweep, ...] = ()
    quick: bool = False
    device: str = "cpu"
    backend: str | None = None
    dtypes: tuple[torch.dtype, ...] = ()
    memory: bool = False
    training: bool = True
    seconds: float = 3.0
    compile_seconds: float = 600.0
    epochs: int = 5

    @property
    def options(self) -> str:
        """What a command needs to measure any of its cases so."""
        backend = f"--backend {self.backend}" if self.backend else ""
        return f"{'--quick' if self.quick else ''} {backend}".strip()


def quick(**changes: Any) -> Plan:
    """The plan of `bigops bench --quick`."""
    return Plan(**({"quick": True, "seconds": 0.8, "compile_seconds": 40.0} | changes))


@dataclass
class Results:
    """What a run found; `as_json` is what `--json` writes."""

    machine: dict[str, Any]
    records: list[Record] = field(default_factory=list)
    overhead: list[dict[str, Any]] = field(default_factory=list)
    peers: dict[str, str] = field(default_factory=dict)
    training: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    stopped: bool = False

    def as_json(self) -> dict[str, Any]:
        """Machine and records as DESIGN has them, and beside them the rest."""
        return asdict(self)

    @property
    def ok(self) -> bool:
        """No case raised, and every error is within its limit."""
        return not self.failed and not failing(self.records)


def _ops(plan: Plan) -> list[Op]:
    if not plan.with_ops:
        return []
    return [get(name) for name in plan.ops] if plan.ops else list(table().values())


def cases(plan: Plan) -> list[Case]:
    """The plan's cases: ops in the table's order, then models; or its sweeps."""
    found = _swept(plan) if plan.sweeps else _usual(plan)
    exact = [case for case in found if case.name == plan.case]
    for case in found:
        case.options = plan.options
    return exact or found


def _swept(plan: Plan) -> list[Case]:
    kind = torch.device(plan.device).type
    return [
        _op_case(op, op.sweeps[sweep.name](size, kind), dtype, plan, (sweep.name, size))
        for op in _ops(plan)
        for sweep in plan.sweeps
        if sweep.name in op.sweeps
        for dtype in op.dtypes
        if dtype in _dtypes(plan)
        for size in sweep.sizes
    ]


def _usual(plan: Plan) -> list[Case]:
    ops = _ops(plan)
    dtypes = _dtypes(plan)
    found: list[Case] = []
    for op in ops:
        for sample in op.samples:
            offered = sample.dtypes or op.dtypes
            if plan.quick and op.is_step and not plan.dtypes:
                offered = offered[:1]  # steps of low precision take torch seconds
            for dtype in offered:
                if sample.bench and dtype in dtypes and plan.case in f"{op.name} {sample.name}":
                    found.append(_op_case(op, sample, dtype, plan))
    found += [
        case
        for case in model_cases(plan.quick, plan.device, plan.backend)
        if case.dtype in dtypes
        if case.subject in plan.models and plan.case in f"{case.subject} {case.name}"
    ]
    return found


def _dtypes(plan: Plan) -> tuple[torch.dtype, ...]:
    if plan.dtypes:
        return plan.dtypes
    usual = DTYPES[torch.device(plan.device).type]
    if plan.quick and plan.device == "cpu":  # else eager would take seconds a call
        return tuple(dtype for dtype in usual if native.torch_multiplies(dtype))
    return usual


def _op_case(
    op: Op,
    sample: Sample,
    dtype: torch.dtype,
    plan: Plan,
    sweep: tuple[str, int] | None = None,
) -> OpCase:
    swept = {"name": sweep[0], "value": sweep[1]} if sweep else None
    return STEPS.get(op.name, OpCase)(op, sample, dtype, plan.device, plan.backend, swept)


def run(plan: Plan, progress: Callable[[str, int, int], None] = lambda *_: None) -> Results:
    """Carry out `plan`; `progress(what, done, total)` is called before each piece of work.

    A case that raises is noted and the others go on; a KeyboardInterrupt ends the run with what it
    has found by then.
    """
    results = Results(machine.describe(plan.device), peers=dict(peers.packages()))
    ceilings = Ceilings(plan.device)
    try:
        _carry_out(plan, results, ceilings, progress)
    except KeyboardInterrupt:
        results.stopped = True
        results.failed.append("stopped: the cases measured by then are all there is")
    results.machine["ceilings"] = ceilings.as_json()
    return results


def _carry_out(
    plan: Plan, results: Results, ceilings: Ceilings, progress: Callable[[str, int, int], None]
) -> None:
    todo = cases(plan)
    ops = _ops(plan) if not (plan.case or plan.sweeps) else []
    total = len(todo) + len(ops) + plan.training
    effort = Effort(plan.seconds, plan.compile_seconds, plan.memory, results.notes)
    for done in range(total - len(ops) - plan.training):
        case = todo.pop(0)  # with its inputs it can go as soon as it is measured
        progress(case.title, done, total)
        with _Guard(case.title, results):
            results.records += measure(case, ceilings, effort)
    usual = DTYPES[torch.device(plan.device).type]
    for dtype in () if plan.dtypes else set(usual) - set(_dtypes(plan)):
        name = dtype_name(dtype)
        results.notes.append(
            f"no {name}: this processor has no products of it, and eager takes seconds a call; "
            f"--dtype {name} measures it"
        )
    if absent := [name for name, found in results.peers.items() if found == NOT_INSTALLED]:
        results.notes.append(f"no peers from {', '.join(absent)}: {NOT_INSTALLED}")
    if effort.not_compiled:
        listed = "; ".join(effort.not_compiled)
        spent = f", its {plan.compile_seconds:g} s were spent" if plan.compile_seconds else ""
        results.notes.append(f"no torch.compile beside these{spent}: {listed}")
    for done, op in enumerate(ops, total - len(ops) - plan.training):
        progress(f"{op.name} call overhead", done, total)
        with _Guard(f"{op.name} call overhead", results):
            results.overhead += overhead(op, plan.device, plan.backend, min(0.5, plan.seconds))
    if plan.training:
        progress("training the CNN and its twin", total - 1, total)
        results.training = twins(plan, results)
    progress("done", total, total)


def asked(plan: Plan) -> Callable[[Record], bool]:
    """Whether a record of another run is one that this plan should have as well."""
    here = {(case.subject, dtype_name(case.dtype)) for case in cases(plan)}

    def told(record: Record) -> bool:
        narrowed = plan.case or plan.sweeps or record["sweep"]
        return not narrowed and (subject(record), record["dtype"]) in here

    return told


def again(
    plan: Plan,
    results: Results,
    keys: Collection[Key],
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> None:
    """Measure the records with these keys once more, for twice as long, and put them in place."""
    titles = {(k[0], k[1].removesuffix(GRAPH), k[4]) for k in keys}
    todo = [c for c in cases(plan) if (c.subject, c.name, dtype_name(c.dtype)) in titles]
    ceilings = Ceilings(plan.device)
    effort = Effort(2.0 * plan.seconds, plan.compile_seconds, plan.memory, results.notes)
    for done, case in enumerate(todo):
        progress(f"{case.title}, once more", done, len(todo))
        with _Guard(case.title, results):
            second = {key(record): record for record in measure(case, ceilings, effort)}
            results.records = [second.get(key(first), first) for first in results.records]
            results.notes.append(f"{case.title}: its figures are those of a second, longer look")


def twins(plan: Plan, results: Results) -> dict[str, Any] | None:
    """Train the CNN and its plain twin side by side on the digits."""
    from bigops.training import CNNRecipe, InputError, train_twins

    recipe = CNNRecipe(epochs=plan.epochs)
    try:
        ours, plain = train_twins(recipe, device=plan.device)
    except InputError as error:
        results.notes.append(f"training left out: {error}")
        return None
    ratios = sorted(p / o for p, o in zip(plain.step_seconds, ours.step_seconds, strict=True))
    return {
        "model": recipe.name,
        "recipe": asdict(recipe),
        "losses": ours.losses,
        "plain_losses": plain.losses,
        "evaluations": [asdict(e) for e in ours.evaluations],
        "plain_evaluations": [asdict(e) for e in plain.evaluations],
        "step_ms": ours.step_ms,
        "plain_step_ms": plain.step_ms,
        "speedup": ratios[len(ratios) // 2],
    }


def find(
    subject: str, name: str, dtype: torch.dtype, device: str, forced: str | None, sweep: str = ""
) -> tuple[Case, Case | None]:
    """The case with these names, and a tiny one that loads the same libraries."""
    if subject in table():
        op = get(subject)
        plan = Plan(
            (subject,),
            device=device,
            backend=forced,
            dtypes=(dtype,),
            models=(),
            sweeps=(parse(sweep),) if sweep else (),
        )
        small = next((s for s in op.samples if not s.bench), None)
        tiny = _op_case(op, small, dtype, plan) if small else None
        return next(case for case in cases(plan) if case.name == name), tiny
    small = {"CNN": cnn(2), "ResNet18": resnet18(2, 32)}
    small_setting = small.get(subject, transformer(1, 8, 64, 1))
    all_models = model_cases(True, device, forced) + model_cases(False, device, forced)
    found = next(c for c in all_models if (c.subject, c.name) == (subject, name))
    return found, ModelCase(small_setting, device, forced)


class _Guard:
    """Notes what a case raises, and goes on."""

    def __init__(self, title: str, results: Results) -> None:
        self._title, self._results = title, results

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: Any, traceback: Any) -> bool:
        if kind is None or not issubclass(kind, Exception):
            return False
        line = first_line(error)
        if issubclass(kind, BackendError):
            self._results.notes.append(f"{self._title}: left out: {line}")
        else:
            self._results.failed.append(f"{self._title}: {kind.__name__}: {line}")
        return True
