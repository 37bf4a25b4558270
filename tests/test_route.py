"""The short road of a repeated call: taken when everything agrees, and only then."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import bigops
from bigops.ops import get, route

OP = get("conv2d_act")
INPUT, WEIGHT, BIAS = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3), torch.randn(4)
OPTIONS = (1, 0, 1, 1, "relu")


@pytest.fixture(autouse=True)
def _known() -> None:
    """One call has been made, and has left its route."""
    OP.routes.clear()
    bigops.conv2d_relu(INPUT, WEIGHT, BIAS)
    if bigops.explain(bigops.conv2d_relu, INPUT, WEIGHT, BIAS).backend != "native":
        pytest.skip("the native kernels are not built")


def known(*tensors: Any, options: tuple[Any, ...] = OPTIONS) -> bool:
    return route.find(OP, (*(tensors or (INPUT, WEIGHT, BIAS)), None), options) is not None


def test_a_call_alike_is_known() -> None:
    assert known(torch.randn(2, 3, 8, 8), WEIGHT.clone(), BIAS.clone())
    assert known(INPUT, torch.nn.Parameter(WEIGHT, requires_grad=False), BIAS)


def test_known_and_new_calls_give_the_same_bits() -> None:
    leaves = [t.clone().requires_grad_() for t in (INPUT, WEIGHT, BIAS)]
    runs = []
    for _ in range(2):
        out = bigops.conv2d_relu(*leaves)
        runs.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    assert len(OP.routes) == 2
    for new, again in zip(*runs, strict=True):
        assert torch.equal(new, again)


@pytest.mark.parametrize(
    "tensors",
    [
        (INPUT[:1], WEIGHT, BIAS),
        (INPUT, WEIGHT, None),
        (INPUT.double(), WEIGHT.double(), BIAS.double()),
        (INPUT.transpose(2, 3), WEIGHT, BIAS),
        (INPUT.clone().requires_grad_(), WEIGHT, BIAS),
        (INPUT.to_sparse(), WEIGHT, BIAS),
        (INPUT.to("meta"), WEIGHT, BIAS),
        (INPUT.numpy(), WEIGHT, BIAS),
    ],
    ids=["shape", "no bias", "dtype", "strides", "gradient", "sparse", "device", "no tensor"],
)
def test_another_tensor_is_not_known(tensors: tuple[Any, ...]) -> None:
    assert not known(*tensors)


@pytest.mark.parametrize("stride", [2, 1.0, True, [1]])
def test_another_option_is_not_known(stride: Any) -> None:
    """Not even one that is equal, but of another type."""
    assert not known(options=(stride, *OPTIONS[1:]))


def test_a_known_call_does_not_hide_a_bad_one() -> None:
    with pytest.raises(ValueError, match="stride"):
        bigops.conv2d_relu(INPUT, WEIGHT, BIAS, 1.0)


def test_whoever_watches_is_shown_the_call() -> None:
    class Seen(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: list[str] = []

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            self.names.append(str(func))
            return func(*args, **(kwargs or {}))

    with Seen() as seen:
        bigops.conv2d_relu(INPUT, WEIGHT, BIAS)
    assert "bigops.conv2d_act.default" in seen.names
    batched = torch.vmap(lambda x: bigops.conv2d_relu(x[None], WEIGHT, BIAS)[0])(INPUT)
    torch.testing.assert_close(batched, bigops.conv2d_relu(INPUT, WEIGHT, BIAS))


def test_autocast_and_force_still_hold() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert bigops.conv2d_relu(INPUT, WEIGHT, BIAS).dtype == torch.bfloat16
    with bigops.use_backend("reference"):
        assert not known()
        assert bigops.explain(bigops.conv2d_relu, INPUT, WEIGHT, BIAS).backend == "reference"
    with torch.no_grad():
        assert not known()  # what a gradient needs may decide
    assert known()


def test_a_changed_tensor_leaves_no_route() -> None:
    """An image without a batch is unsqueezed: the backend's argument is another tensor."""
    OP.routes.clear()
    assert bigops.conv2d_relu(INPUT[0], WEIGHT, BIAS).dim() == 3
    assert not OP.routes


def test_routes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(route, "MOST", 3)
    for rows in range(8, 20):
        bigops.conv2d_relu(torch.randn(1, 3, rows, 8), WEIGHT, BIAS)
    assert len(OP.routes) <= 3
