"""Made-up results of a bench run, for the tests of the report; none is a measurement."""

from __future__ import annotations

from typing import Any

Record = dict[str, Any]


def record(**changes: Any) -> Record:
    """A record that has everything."""
    return {
        "op": "attention", "case": "1x8x2048x64", "pass": "forward", "device": "cpu",
        "dtype": "float32", "backend": "native", "time_ms": 30.0, "eager_ms": 60.0,
        "compile_ms": 50.0, "best_ms": 40.0, "best_name": "flex_attention",
        "speedup_vs_eager": 2.0, "speedup_vs_best": 4 / 3, "spread": 0.02, "torch_share": 0.0,
        "error": 1e-7, "eager_error": 9e-8, "error_limit": 2e-7, "peak_bytes": 20 * 2**20,
        "eager_peak_bytes": 300 * 2**20, "gflops": 290.0, "gbytes": 0.58, "percent_of_limit": 75.0,
        "peers_ms": {"eager": 60.0, "compile": 50.0, "flex_attention": 40.0, "cudnn": None},
        "sweep": None, "options": "--quick",
    } | changes  # fmt: skip


def swept(sizes: tuple[int, ...] = (512, 1024, 2048, 4096), **changes: Any) -> list[Record]:
    """A sweep over S, each time the square of the size."""
    return [
        record(
            case=f"{2**14 // size}x8x{size}x64 causal",
            sweep={"name": "S", "value": size},
            time_ms=1e-5 * size**2,
            peers_ms={"eager": 3e-5 * size**2, "compile": 2e-5 * size**2, "cudnn": None},
        )
        | changes
        for size in sizes
    ]


def machine(**changes: Any) -> dict[str, Any]:
    """A machine with two roofs and three streams."""
    return {
        "cpu": "Some Processor", "cores": 2, "threads": 2, "isa": "v4", "isas": ["v3", "v4"],
        "memory_bytes": 2**34, "os": "Linux", "python": "3.12.1", "torch": "2.13.0",
        "triton": None, "bigops": "0.1.0", "device": "cpu", "gpu": None,
        "ceilings": {
            "matmul float32 GFLOP/s": 400.0, "matmul bfloat16 GFLOP/s": 2600.0,
            "copy 8 MiB GB/s": 60.0, "copy 64 MiB GB/s": 50.0, "update 32 MiB GB/s": 110.0,
        },
    } | changes  # fmt: skip


TRAINING = {
    "model": "cnn",
    "losses": [2.3 / (1 + step / 20) for step in range(90)],
    "plain_losses": [2.3 / (1 + step / 20) + 1e-4 for step in range(90)],
    "evaluations": [{"accuracy": 0.9, "loss": 0.4}, {"accuracy": 0.95, "loss": 0.3}],
    "plain_evaluations": [{"accuracy": 0.9, "loss": 0.4}, {"accuracy": 0.95, "loss": 0.3}],
    "step_ms": 1.0,
    "plain_step_ms": 2.0,
    "speedup": 2.0,
}
OVERHEAD = {
    "op": "attention", "case": "one element", "pass": "forward", "device": "cpu",
    "backend": "native", "ours_us": 8.0, "eager_us": 5.0, "overhead_us": 3.0, "spread_us": 0.2,
    "limit_us": 20.0,
}  # fmt: skip


def results(records: list[Record], **changes: Any) -> dict[str, Any]:
    """A run's results around the records."""
    return {
        "machine": machine(),
        "records": records,
        "overhead": [OVERHEAD],
        "peers": {"flash-attn": "not installed", "liger-kernel": "0.6.4"},
        "training": TRAINING,
        "notes": ["no cudnn: needs a GPU"],
        "failed": [],
    } | changes


def full() -> dict[str, Any]:
    """Results with every section of the report, and every kind of record."""
    records = [
        record(),
        record(case="2x8:2x1024x64 causal", dtype="bfloat16", gflops=1200.0, gbytes=1.2),
        record(op="adam", case="48 tensors, 14.2M, clipped", gflops=27.0, gbytes=48.0,
               speedup_vs_eager=8.5, best_name="fused"),
        record(op="relu", case="8192x4096", gflops=0.0, gbytes=45.0, speedup_vs_eager=0.8,
               speedup_vs_best=0.7),
        record(case="256 images 28x28, SGD", op=None, model="CNN", gflops=None, gbytes=None,
               percent_of_limit=None, compile_ms=None, torch_share=None, error=None),
        *swept(),
        *swept(dtype="bfloat16", gflops=900.0),
    ]  # fmt: skip
    return results(records)
