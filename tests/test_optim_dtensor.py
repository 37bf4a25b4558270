"""The optimizers over DTensors: shards in, DTensor states out, on a mesh of one process."""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import bigops

if not torch.distributed.is_available():
    pytest.skip("torch is built without torch.distributed", allow_module_level=True)
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

COMMON = runpy.run_path(str(Path(__file__).with_name("test_optim.py")))
parameters, set_gradients = COMMON["parameters"], COMMON["set_gradients"]
SHAPES = [(7,), (65, 64), (2, 3, 5, 4)]
CLASSES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "AdamW": (bigops.optim.AdamW, torch.optim.AdamW, {"lr": 0.1, "amsgrad": True}),
    "SGD": (bigops.optim.SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
}


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


@pytest.mark.parametrize(("ours", "theirs", "options"), CLASSES.values(), ids=CLASSES)
@pytest.mark.parametrize("max_grad_norm", [None, 1.0], ids=["whole", "clipped"])
@pytest.mark.parametrize("placement", [Shard(0), Replicate()], ids=str)
def test_dtensors(
    ours: Any, theirs: Any, options: Any, max_grad_norm: float | None, placement: Any, mesh: Any
) -> None:
    whole = parameters(shapes=SHAPES)
    sharded = [
        torch.nn.Parameter(distribute_tensor(p.detach().clone(), mesh, [placement])) for p in whole
    ]
    torchs = theirs(whole, **options)
    optimizer = ours(sharded, max_grad_norm=max_grad_norm, **options)
    for step in range(3):
        set_gradients(whole, step, torch.float32)
        for p, s in zip(whole, sharded, strict=True):
            s.grad = distribute_tensor(p.grad.clone(), mesh, [placement])
        optimizer.step()
        if max_grad_norm is not None:
            norm = torch.nn.utils.clip_grad_norm_(whole, max_grad_norm)
            torch.testing.assert_close(optimizer.grad_norm, norm)
        torchs.step()
    for p, s in zip(whole, sharded, strict=True):
        torch.testing.assert_close(s.full_tensor(), p)
        assert optimizer.state[s].keys() == torchs.state[p].keys()
        for name, want in torchs.state[p].items():
            got = optimizer.state[s][name]
            assert isinstance(got, DTensor) == (name != "step")
            assert name == "step" or got.placements == s.placements
            torch.testing.assert_close(got.full_tensor() if name != "step" else got, want)


def test_masters_are_sharded_and_codes_refused(mesh: DeviceMesh) -> None:
    param = torch.nn.Parameter(distribute_tensor(torch.ones(8, 4).bfloat16(), mesh, [Shard(0)]))
    with pytest.raises(ValueError, match="state_dtype must not be 'int8' for DTensor"):
        bigops.optim.Adam([param], state_dtype="int8")
    optimizer = bigops.optim.SGD([param], lr=2**-11, master_weights=True)
    for _ in range(4):
        param.grad = distribute_tensor(torch.ones(8, 4).bfloat16(), mesh, [Shard(0)])
        optimizer.step()
    master = optimizer.state[param]["master_param"]
    assert isinstance(master, DTensor)
    assert torch.equal(master.full_tensor(), torch.full((8, 4), 1 - 2**-9))
