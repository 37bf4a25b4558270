"""Rung 7: optimizers and reference models on a GPU against torch's; `bigops doctor` there.

The same bodies run on a CPU with the native kernels, in every run.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_places import Place, anywhere, gpu_only
from torch import Tensor
from torch.nn import functional as F

import bigops
from bigops import check
from bigops.bench.models import ModelCase, Setting, cnn, transformer

SHAPES = [(7,), (65, 64), (), (0, 3), (2, 3, 5, 4), (70001,)]
STEPS = 6
# Ours, torch's, the options of both, and the norm to clip by.
OPTIMIZERS: dict[str, tuple[Any, Any, dict[str, Any], float | None]] = {
    "Adam": (bigops.optim.Adam, torch.optim.Adam, {}, None),
    "Adam, decay": (
        bigops.optim.Adam, torch.optim.Adam, {"weight_decay": 0.1, "maximize": True}, 1.0,
    ),
    "AdamW": (bigops.optim.AdamW, torch.optim.AdamW, {"lr": 0.02}, 1.0),
    "AdamW, amsgrad": (
        bigops.optim.AdamW, torch.optim.AdamW, {"amsgrad": True, "betas": (0.9, 0.5)}, None,
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _ieee() -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def drawn(seed: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Numbers of `dtype`, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype).to(device) for shape in SHAPES]


def parameters(dtype: torch.dtype, device: str) -> list[Tensor]:
    return [torch.nn.Parameter(t) for t in drawn(99, dtype, device)]


def wide(params: Sequence[Tensor]) -> list[Tensor]:
    return [torch.nn.Parameter(p.detach().double()) for p in params]


def tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Parameters and states by name."""
    params = optimizer.param_groups[0]["params"]
    found = {f"param {i}": p.detach() for i, p in enumerate(params)}
    for i, p in enumerate(params):
        found |= {f"{name} {i}": t for name, t in optimizer.state[p].items()}
    return found


def assert_as_true(ours: Any, theirs: Any, exact: Any) -> None:
    got, plain, want = tensors(ours), tensors(theirs), tensors(exact)
    assert got.keys() == plain.keys() == want.keys()
    found = [check.compare(name, got[name], plain[name], want[name]) for name in want]
    assert all(c.ok for c in found), [c for c in found if not c.ok]


@anywhere("adam", "grad_norm")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_optimizer_goes_torchs_way(case: Any, dtype: torch.dtype, place: Place) -> None:
    ours, theirs, options, clip = case
    device, backend = place
    params = parameters(dtype, device)
    optimizers = (
        ours(parameters(dtype, device), max_grad_norm=clip, **options),
        theirs(parameters(dtype, device), **options),
        theirs(wide(params), **options),
    )
    for step in range(STEPS):
        for optimizer in optimizers:
            own = optimizer.param_groups[0]["params"]
            for p, grad in zip(own, drawn(step, dtype, device), strict=True):
                p.grad = grad.to(p.dtype)
            if clip is not None and optimizer is not optimizers[0]:
                torch.nn.utils.clip_grad_norm_(own, clip)
            with bigops.use_backend(backend if optimizer is optimizers[0] else None):
                optimizer.step()
    assert_as_true(*optimizers)


@anywhere("adam", "grad_norm")
# The gradients' norm is about 270: above the first, and below the second unless it is still scaled.
@pytest.mark.parametrize("clip", [None, 1.0, 1000.0], ids=["", "clipped", "not clipped"])
def test_grad_scaler_unscales_and_skips(clip: float | None, place: Place) -> None:
    """A step with an infinite gradient changes nothing and halves the scale, as with torch's."""
    device, backend = place

    def run(optimizer: Any, backend: str | None, unscale: bool) -> float:
        scaler = torch.amp.GradScaler(device, init_scale=1024.0, growth_interval=2)
        params = optimizer.param_groups[0]["params"]
        for step in range(STEPS):
            weights = drawn(step, torch.float32, device)
            if step == 3:
                weights[1][0, 0] = float("inf")
            optimizer.zero_grad()
            terms = [(p * w.to(p.dtype)).sum() for p, w in zip(params, weights, strict=True)]
            scaler.scale(torch.stack(terms).sum()).backward()
            if unscale and clip is not None:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(params, clip)
            with bigops.use_backend(backend):
                scaler.step(optimizer)
            scaler.update()
        return scaler.get_scale()

    params = parameters(torch.float32, device)
    ours = bigops.optim.AdamW(parameters(torch.float32, device), max_grad_norm=clip)
    theirs, exact = torch.optim.AdamW(params), torch.optim.AdamW(wide(params))
    scales = [run(ours, backend, False), run(theirs, None, True), run(exact, None, True)]
    assert scales[0] == scales[1] == scales[2] == 2048.0
    assert tensors(ours)["step 0"].item() == STEPS - 1
    assert_as_true(ours, theirs, exact)


@gpu_only("adam", "grad_norm")
@pytest.mark.parametrize("clip", [None, 1.0], ids=["", "clipped"])
def test_optimizers_step_waits_for_nothing(clip: float | None, place: Place) -> None:
    """Step counts are the host's; what clips is read by the kernel from the device."""
    params = parameters(torch.float32, place[0])
    optimizer = bigops.optim.AdamW(params, max_grad_norm=clip)
    with bigops.use_backend(place[1]):
        for _ in range(3):
            for p, grad in zip(params, drawn(1, torch.float32, place[0]), strict=True):
                p.grad = grad
            torch.cuda.synchronize()
            optimizer.step()
        assert optimizer.state[params[0]]["step"].device.type == "cpu"
        torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


STATES: dict[str, tuple[Any, dict[str, Any]]] = {
    "AdamW": (bigops.optim.AdamW, {"capturable": True}),
    "AdamW, amsgrad": (bigops.optim.AdamW, {"capturable": True, "amsgrad": True}),
    "AdamW, codes": (bigops.optim.AdamW, {"capturable": True, "state_dtype": "int8"}),
    "AdamW, masters": (bigops.optim.AdamW, {"capturable": True, "master_weights": True}),
    "SGD, codes": (bigops.optim.SGD, {"momentum": 0.9, "state_dtype": "int8"}),
}


@anywhere("adam", "grad_norm", "sgd")
@pytest.mark.parametrize("case", STATES.values(), ids=STATES)
def test_a_captured_step_is_a_step(case: Any, place: Place) -> None:
    """What a graph replays reads new gradients, learning rates and counts. On a CPU there are none,
    and every step is called."""
    cls, options = case
    device, backend = place
    dtype = torch.bfloat16 if options.get("master_weights") else torch.float32
    if backend == "native" and device == "cuda" and "state_dtype" in options:
        pytest.skip("CUDA C++ takes states of the parameters' dtype only")

    def trained(capture: bool) -> Any:
        lr = torch.tensor(0.01, device=device)
        optimizer = cls(parameters(dtype, device), lr=lr, max_grad_norm=1.0, **options)
        params = optimizer.param_groups[0]["params"]
        graph = None
        for step in range(STEPS):
            for p, grad in zip(params, drawn(step, dtype, device), strict=True):
                p.grad = grad if p.grad is None else p.grad.copy_(grad)
            lr.fill_(0.01 * (1 + step))
            if step == 3 and capture:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    optimizer.step()
            if graph is None:
                optimizer.step()
            else:
                graph.replay()
        return optimizer

    with bigops.use_backend(backend):
        captured, stepped = trained(device == "cuda"), trained(False)
    got, want = tensors(captured), tensors(stepped)
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=0)


SETTINGS: dict[str, Callable[[], Setting]] = {
    "CNN": lambda: cnn(64),
    "Transformer": lambda: transformer(4, 40, 128, 2),
}


@anywhere(*bigops.ops.table())
@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_models_gradients_agree_with_the_plain_twins(
    setting: Callable[[], Setting], place: Place
) -> None:
    found = ModelCase(setting(), *place).truth()
    assert len(found) > 8
    assert all(c.ok for c in found), [c for c in found if not c.ok]


@anywhere(*bigops.ops.table())
@pytest.mark.filterwarnings("error::bigops.FallbackWarning")
@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_models_learn_a_batch(setting: Callable[[], Setting], place: Place) -> None:
    device, backend = place
    chosen = setting()
    model = chosen.build(False, False).to(device).train()
    inputs, labels = (t.to(device) for t in chosen.batch())
    optimizer = bigops.optim.AdamW(model.parameters(), lr=1e-3, max_grad_norm=1.0)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), labels)
        loss.backward()
        with bigops.use_backend(backend):
            optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0], losses


@gpu_only()
def test_doctor_finds_the_backends_working(place: Place, tmp_path: Path) -> None:
    path = tmp_path / "doctor.json"
    code = "import sys; from bigops.cli import main; sys.exit(main())"
    subprocess.run([sys.executable, "-c", code, "doctor", "--json", str(path)], check=True)
    found = json.loads(path.read_text())["backends"]
    assert {b["device"]: b["problem"] for b in found if (b["device"], b["name"]) == place} == {
        "cuda": None
    }
