"""What changes between two steps of an optimizer: nothing that one step saw may serve the next.

Each change is made to an optimizer of ours and to torch's, which then have to agree.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bigops
from bigops.backends import native

KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "AdamW": (bigops.optim.AdamW, torch.optim.AdamW, {"lr": 0.1}),
    "SGD": (bigops.optim.SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "SGD without momentum": (bigops.optim.SGD, torch.optim.SGD, {"lr": 0.1}),
}
COUNT = 150  # more than are touched together

kinds = pytest.mark.parametrize(("ours", "theirs", "options"), KINDS.values(), ids=KINDS)
Change = Callable[[torch.optim.Optimizer, list[Tensor]], None]


def tensors_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    states = [s for p in params for s in optimizer.state[p].values() if s is not None]
    return [*(p.detach() for p in params), *states]


def backward(params: list[Tensor], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float32).to(p.dtype)


def trained(cls: Any, options: dict[str, Any], change: Change) -> torch.optim.Optimizer:
    generator = torch.Generator().manual_seed(100)
    # Of one shape: another's states would fit.
    params = [nn.Parameter(torch.randn(4, 3, generator=generator)) for _ in range(COUNT)]
    optimizer = cls(params, **options)
    for step in range(4):
        backward(params, step)
        if step > 0:
            change(optimizer, params)
        optimizer.step()
    return optimizer


def replace_states(optimizer: torch.optim.Optimizer, params: list[Tensor]) -> None:
    for p in params[::2]:
        for name, t in optimizer.state[p].items():
            optimizer.state[p][name] = None if t is None else t.clone()


def move_states(optimizer: torch.optim.Optimizer, params: list[Tensor]) -> None:
    """As those do who keep states elsewhere between steps."""
    for p in params[1::3]:
        for t in optimizer.state[p].values():
            if t is not None:
                t.data = t.data.clone() + (t.dim() > 0)


def reverse_states(optimizer: torch.optim.Optimizer, params: list[Tensor]) -> None:
    """Neither parameters nor names in the order in which they began."""
    entries = [(p, dict(reversed(state.items()))) for p, state in optimizer.state.items()]
    optimizer.state.clear()
    optimizer.state.update(reversed(entries))


def lose_a_state(optimizer: torch.optim.Optimizer, params: list[Tensor]) -> None:
    optimizer.state.pop(params[7], None)


def load(optimizer: torch.optim.Optimizer, params: list[Tensor]) -> None:
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        for name, t in state.items():
            if t is not None and t.dim() > 0:
                state[name] = 2 * t
    optimizer.load_state_dict(saved)


def replace_data(optimizer: torch.optim.Optimizer, params: list[Tensor]) -> None:
    for p in params[::2]:
        p.data = p.data.T.contiguous().T + 1


def replace_gradients(optimizer: torch.optim.Optimizer, params: list[Tensor]) -> None:
    for i, p in enumerate(params):
        if i % 3 == 0:
            p.grad = None
        elif i % 3 == 1:
            p.grad = torch.ones(1).expand(p.shape)


def swap_gradients(optimizer: torch.optim.Optimizer, params: list[Tensor]) -> None:
    """Objects that were seen before, of another parameter."""
    params[0].grad, params[5].grad = params[5].grad, params[0].grad


def no_gradients(optimizer: torch.optim.Optimizer, params: list[Tensor]) -> None:
    optimizer.zero_grad()


def write_in_place(optimizer: torch.optim.Optimizer, params: list[Tensor]) -> None:
    with torch.no_grad():
        for p in params:
            p.mul_(0.5)
            p.grad.add_(1)


def add_group(optimizer: torch.optim.Optimizer, params: list[Tensor]) -> None:
    more = [nn.Parameter(torch.full((3,), float(len(optimizer.param_groups)))) for _ in range(20)]
    for p in more:
        p.grad = torch.ones(3)
    optimizer.add_param_group({"params": more, "lr": 0.01})


def change_group(optimizer: torch.optim.Optimizer, params: list[Tensor]) -> None:
    group = optimizer.param_groups[0]
    group["lr"] *= 0.5
    group["params"] = group["params"][1:]


CHANGES: tuple[Change, ...] = (
    replace_states,
    move_states,
    reverse_states,
    lose_a_state,
    load,
    replace_data,
    replace_gradients,
    swap_gradients,
    no_gradients,
    write_in_place,
    add_group,
    change_group,
)


@kinds
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changes(ours: Any, theirs: Any, options: dict[str, Any], change: Change) -> None:
    got, wanted = (tensors_of(trained(cls, options, change)) for cls in (ours, theirs))
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


@kinds
def test_two_optimizers_share_a_parameter(ours: Any, theirs: Any, options: dict[str, Any]) -> None:
    results = []
    for cls in (ours, theirs):
        params = [nn.Parameter(torch.ones(5)) for _ in range(3)]
        optimizers = [cls(params, **options), cls(params[::-1], **options)]
        for step in range(6):
            backward(params, step)
            optimizers[step % 2].step()
        results.append([t for optimizer in optimizers for t in tensors_of(optimizer)])
    torch.testing.assert_close(*results)


def negative() -> Tensor:
    return torch.ones(5, 2, dtype=torch.complex64).conj().imag


def of_another_shape() -> Tensor:
    return torch.ones(5, 3)


@kinds
@pytest.mark.parametrize("wrong", [negative, of_another_shape], ids=lambda wrong: wrong.__name__)
def test_a_wrong_gradient_is_named_and_nothing_is_written(
    ours: Any, theirs: Any, options: dict[str, Any], wrong: Callable[[], Tensor]
) -> None:
    params = [nn.Parameter(torch.ones(5, 2)) for _ in range(COUNT)]
    optimizer = ours(params, **options)
    backward(params, 0)
    optimizer.step()
    before = copy.deepcopy(tensors_of(optimizer))
    versions = [p._version for p in params]
    # As another thread may, past the setter's check.
    params[-1].grad.data = wrong()
    with pytest.raises(ValueError, match=rf"grads\[{COUNT - 1}\] must"):
        optimizer.step()
    torch.testing.assert_close(tensors_of(optimizer), before, rtol=0, atol=0)
    assert [p._version for p in params] == versions


def test_a_step_that_is_skipped_writes_nothing() -> None:
    param = nn.Parameter(torch.ones(5))
    optimizer = bigops.optim.AdamW([param])
    for found in (0.0, 1.0):
        param.grad = torch.ones(5)
        optimizer.found_inf = torch.tensor(found)
        before = param.detach().clone()
        optimizer.step()
        assert torch.equal(param, before) == bool(found)
        assert optimizer.state[param]["step"] == 1


def test_a_wrong_number_is_named_on_the_short_road_too() -> None:
    param = nn.Parameter(torch.ones(5))
    optimizer = bigops.optim.AdamW([param])
    for eps in (1e-8, "small"):
        param.grad = torch.ones(5)
        optimizer.param_groups[0]["eps"] = eps
        if eps == "small":
            with pytest.raises(TypeError, match="eps"):
                optimizer.step()
        else:
            optimizer.step()


@pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))
def test_norm_has_the_bits_that_a_list_gives() -> None:
    double = {"dtype": torch.float64}  # float32's digits would hide the order of a sum
    params = [nn.Parameter(torch.randn(33, 47, **double)) for _ in range(9)]
    layouts = [nn.Parameter(torch.randn(20, 30, 5, 7, **double)) for _ in range(4)]
    optimizer = bigops.optim.AdamW([{"params": params}, {"params": layouts}], max_grad_norm=1.0)
    for _ in range(8):
        for p in params:
            p.grad = torch.randn_like(p)
        for p in layouts:
            p.grad = torch.randn_like(p).contiguous(memory_format=torch.channels_last)
        optimizer.step()
        grads = [p.grad for p in (*params, *layouts)]
        assert torch.equal(optimizer.grad_norm, bigops.ops.adam.grad_norm(grads))


@pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))
def test_tensors_lie_where_they_are_looked_for() -> None:
    """Else nothing is wrong, but a step over many small tensors takes twice as long."""
    assert all(native.kernels.tensor_memory())
