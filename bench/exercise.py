"""Every op's small samples once, forward and backward, nothing judged: something to run under.

    python -m bigops.bench.exercise --device cuda --jobs 16
    compute-sanitizer --tool racecheck python -m bigops.bench.exercise --device cuda --seconds 20

With --jobs the calls are divided among processes that fill Triton's cache on disk together: one
process compiles for a quarter of an hour what a check of all samples needs. Ops take turns, so that
a run that is cut short has called each of them.
"""

from __future__ import annotations

import argparse
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import zip_longest

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bigops import check
from bigops.ops import BackendError, Op, Sample, get, table, use_backend

Call = tuple[Op, Sample, str, torch.dtype]


def calls(device: str, names: Sequence[str] = (), bench: bool = False) -> list[Call]:
    """Every sample on every backend that `device` has, in an order that is mixed but fixed."""
    kind = torch.device(device).type
    queues = []
    for op in [get(name) for name in names] or table().values():
        backends = [backend.name for backend in op.backends if kind in backend.devices]
        backends = [name for name in backends if not (name == "triton" and kind == "cpu")]
        queue = list(check.cases([op], backends))
        random.Random(0).shuffle(queue)
        if bench:
            queue += check.cases([op], backends, bench=True)
        queues.append(queue)
    turns = zip_longest(*queues)
    return [call for turn in turns for call in turn if call is not None]


def make(call: Call, device: str) -> None:
    """Forward and backward; done when the device is."""
    op, sample, backend, dtype = call
    args, kwargs = sample.make(device, dtype)
    with use_backend(backend):
        result = op.function(*args, **kwargs)
    roots = [t for t in _tensors(result) if t.requires_grad]
    leaves = [t for t in _tensors((args, kwargs)) if t.requires_grad]
    if roots:
        grads = [torch.ones_like(root) for root in roots]
        torch.autograd.grad(roots, leaves, grads, allow_unused=True)
    _wait(device)


def _tensors(tree: object) -> Iterator[Tensor]:
    return (leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor))


def _wait(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def exercise(todo: Sequence[Call], device: str, seconds: float) -> int:
    """Make the calls until the time is over; prints what raised and how many were made."""
    end = time.monotonic() + seconds
    made = raised = 0
    for call in todo:
        if time.monotonic() > end:
            break
        op, sample, backend, dtype = call
        torch.manual_seed(0)
        try:
            for tf32 in (False, True) if sample.bench and dtype == torch.float32 else (False,):
                # Truth is judged without TF32, time is taken with what torch's flags allow.
                torch.backends.cudnn.allow_tf32 = tf32
                make(call, device)
            made += 1
        except BackendError:  # not served: no call of a kernel
            continue
        except Exception as error:
            raised += 1
            line = (str(error).strip().splitlines() or [""])[0]
            print(f"{op.name} {backend} {dtype} {sample.name}: {type(error).__name__}: {line}")
            try:
                _wait(device)
            except Exception as lost:  # after an illegal access every later call would fail
                print(f"the device is lost to this process: {str(lost).splitlines()[0]}")
                break
    print(f"{made} calls, {raised} raised", flush=True)
    return 1 if raised else 0


def divided(words: Sequence[str], jobs: int) -> int:
    """The same in `jobs` processes, each with its part of the calls."""
    command = [sys.executable, "-m", "bigops.bench.exercise", *words]
    processes = [
        subprocess.Popen([*command, "--part", str(i), str(jobs)], stdout=subprocess.PIPE, text=True)
        for i in range(jobs)
    ]
    outputs = [process.communicate()[0] for process in processes]
    total = [0, 0]
    for output in outputs:
        found = re.search(r"^(\d+) calls, (\d+) raised$", output, re.MULTILINE)
        print(output.replace(found[0], "").strip() if found else output, end="")
        if found:
            total = [total[0] + int(found[1]), total[1] + int(found[2])]
    lost = sum(process.returncode not in (0, 1) for process in processes)
    print(f"\n{total[0]} calls, {total[1]} raised" + (f", {lost} processes died" if lost else ""))
    return 1 if total[1] or lost else 0


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bigops.bench.exercise")
    parser.add_argument("ops", nargs="*", metavar="OP")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--bench", action="store_true", help="the realistic sizes too, after all")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--part", type=int, nargs=2, default=(0, 1), metavar=("I", "N"))
    args = parser.parse_args(words)
    if args.jobs > 1:
        kept = [*args.ops, "--device", args.device, "--seconds", str(args.seconds)]
        return divided(kept + (["--bench"] if args.bench else []), args.jobs)
    part, parts = args.part
    todo = calls(args.device, args.ops, args.bench)[part::parts]
    return exercise(todo, args.device, args.seconds)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
