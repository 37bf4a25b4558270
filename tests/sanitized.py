"""pytest on a sanitized native module: `python tests/sanitized.py MODULE [pytest's arguments]`.

Runs with the sanitizer's library preloaded; tests/test_sanitizers.py builds the module and starts
it. A sanitizer ends the process at its first finding.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch  # before the module: both share its OpenMP runtime


def load(path: str) -> None:
    """Put the file where bigops.backends.native will find its module: already imported."""
    name = f"bigops.{Path(path).name.partition('.')[0]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])


def test_samples_in_float64() -> None:
    """Every small sample, outputs and gradients, where test_ops.py leaves float64 to gradcheck."""
    from bigops import check, ops

    count = 0
    for op in ops.table().values():
        if torch.float64 in op.dtypes:
            continue
        for sample in op.samples:
            if sample.bench or (sample.dtypes and torch.float64 not in sample.dtypes):
                continue
            if check.serves(op, sample, "native", torch.float64, "cpu") is not None:
                continue
            for found in check.check_sample(op, sample, "native", torch.float64):
                # float64 has no better reference to be judged by: near is enough here.
                assert found.ok or found.error < 1e-12, (op.name, sample.name, found)
            count += 1
    assert count >= 50


def test_a_short_output_is_refused() -> None:
    """Sizes that do not fit are an error before the first write."""
    from bigops.backends import native

    query = torch.randn(1, 1, 8, 16)
    lse = torch.empty(1, 1, 8)
    none = (None,) * 6
    rest = (-1, -1, False, 0.25, 0.0, 0.0)
    with pytest.raises(ValueError, match="out and grad_out must be"):
        native.kernels.attention_forward(
            query, query, query, *none, torch.empty(1, 1, 7, 16), lse, *rest
        )


def main(path: str, arguments: list[str]) -> int:
    load(path)
    from bigops.backends import native

    assert native.kernels.__file__ == path
    # Captured by its descriptor, the sanitizer's last words would be lost.
    return pytest.main(["-p", "no:cacheprovider", "-q", "--capture=sys", *arguments])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
