"""The op table's samples on a sanitized native module: `python tests/sanitized.py MODULE`.

Runs with the sanitizer's library preloaded; tests/test_sanitizers.py builds the module and starts
it. A sanitizer ends the process at its first finding.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch  # before the module: both share its OpenMP runtime

DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def load(path: str) -> None:
    """Put the file where bigops.backends.native will find its module: already imported."""
    name = f"bigops.{Path(path).name.partition('.')[0]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])


def run_samples() -> int:
    """Every small sample in every dtype, outputs and gradients; how many there were."""
    from bigops import check, ops

    count = 0
    for op in ops.table().values():
        before = count
        for sample in op.samples:
            for dtype in DTYPES:
                if sample.bench or (sample.dtypes and dtype not in sample.dtypes):
                    continue
                if check.serves(op, sample, "native", dtype, "cpu") is not None:
                    continue
                torch.manual_seed(0)  # as every test has it, so that the draws are the suite's
                for found in check.check_sample(op, sample, "native", dtype):
                    # float64 has no better reference to be judged by: near is enough here.
                    near = dtype == torch.float64 and found.error < 1e-12
                    assert found.ok or near, (op.name, sample.name, dtype, found)
                count += 1
        assert count > before, op.name
    return count


def refuse_a_short_output() -> None:
    """Sizes that do not fit are an error before the first write."""
    from bigops.backends import native

    query = torch.randn(1, 1, 8, 16)
    lse = torch.empty(1, 1, 8)
    try:
        native.kernels.attention_forward(
            query, query, query, None, torch.empty(1, 1, 7, 16), lse, None, 0.25
        )
    except ValueError:
        return
    raise AssertionError("an output that is too short was taken")


def main(path: str) -> None:
    load(path)
    from bigops.backends import native

    assert native.kernels.__file__ == path
    refuse_a_short_output()
    print(run_samples())


if __name__ == "__main__":
    main(sys.argv[1])
