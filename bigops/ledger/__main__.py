"""The ledger's process: a request a line, an answer a line, both JSON.

It is one of its own because Triton decides at import whether it interprets, and because Triton
keeps the GPU that it compiles for.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from ..backends import triton
from ..ops import get
from .architectures import ARCHITECTURES
from .launches import Launch, compiled, compiling_for, launches
from .machine_code import intermediate, machine_code, read

TEXTS = {"sass": machine_code, "ptx": intermediate}


def plan(modules: list[str], ops: list[str], targets: list[str]) -> list[dict[str, Any]]:
    """The launches of the ops, which `modules` declare."""
    for module in modules:
        importlib.import_module(module)
    chosen = [ARCHITECTURES[target] for target in targets]
    return [asdict(launch) for op in ops for launch in launches(get(op), chosen)]


def compile(launch: dict[str, Any], text: str | None) -> Any:
    """The figures of a launch's kernel, or its code as `text` says."""
    asked = Launch(**launch)
    architecture = ARCHITECTURES[asked.target]
    with compiling_for(architecture):
        kernel = compiled(asked)
    return TEXTS[text](kernel, architecture) if text else read(kernel, architecture)


REQUESTS: dict[str, Callable[..., Any]] = {"plan": plan, "compile": compile}


def main() -> None:
    """Answer until the requests end."""
    if triton.INTERPRETED:
        sys.exit("the ledger compiles: TRITON_INTERPRET must not be set")
    # What compilers print goes to stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"answer": REQUESTS[request.pop("do")](**request)}
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
