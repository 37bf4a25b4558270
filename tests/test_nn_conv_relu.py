"""bigops.nn.ConvReLU2d and ConvReLUMaxPool2d against torch's Conv2d and what follows it."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from truth import assert_as_true

from bigops.nn import ConvReLU2d, ConvReLUMaxPool2d

OPTIONS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "padded": ((4, 12, 3), {"padding": 1}),
    "stride, dilation, no bias": ((4, 12, 3), {"stride": (2, 1), "dilation": 2, "bias": False}),
    "same": ((4, 12, (4, 3)), {"padding": "same"}),
    "depthwise": ((8, 8, 3), {"padding": "valid", "groups": 8}),
    "circular": ((4, 12, 3), {"padding": (2, 1), "padding_mode": "circular"}),
    "reflect, same": ((4, 12, (4, 3)), {"padding": "same", "padding_mode": "reflect"}),
    "replicate": ((4, 12, 5), {"padding": 2, "stride": 2, "padding_mode": "replicate"}),
}
POOLS: dict[str, Any] = {"pool_kernel_size": (3, 2), "pool_stride": 2, "pool_padding": (1, 0)}


def _plain(layer: nn.Conv2d) -> nn.Conv2d:
    """torch's Conv2d with the layer's values."""
    twin = copy.deepcopy(layer)
    twin.__class__ = nn.Conv2d
    return twin


def _torch(twin: nn.Conv2d, pools: dict[str, Any], x: Tensor) -> Tensor:
    out = F.relu(twin(x))
    return F.max_pool2d(out, *pools.values()) if pools else out


def _run(call: Any, layer: nn.Module, x: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    out = call(x)
    out.backward(torch.linspace(-1, 1, out.numel(), dtype=x.dtype).view_as(out))
    return {
        "out": out.detach(),
        "input": x.grad,
        **{n: p.grad for n, p in layer.named_parameters()},
    }


@pytest.mark.parametrize("pools", [{}, POOLS], ids=["ReLU", "pool"])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
def test_computes_what_torchs_layers_do(name: str, pools: dict[str, Any]) -> None:
    torch.manual_seed(0)
    args, options = OPTIONS[name]
    layer = ConvReLUMaxPool2d(*args, **options, **pools) if pools else ConvReLU2d(*args, **options)
    plain, wide = _plain(layer), _plain(layer).double()
    x = torch.randn(3, args[0], 20, 18)
    got = _run(layer, layer, x)
    eager = _run(lambda x: _torch(plain, pools, x), plain, x)
    want = _run(lambda x: _torch(wide, pools, x), wide, x.double())
    assert_as_true([got], [eager], [want])


@pytest.mark.parametrize("kind", [ConvReLU2d, ConvReLUMaxPool2d])
def test_is_torchs_layer_in_all_else(kind: type[nn.Conv2d]) -> None:
    torch.manual_seed(0)
    layer = kind(3, 8, 3, padding=1, dtype=torch.float64)
    torch.manual_seed(0)
    plain = nn.Conv2d(3, 8, 3, padding=1, dtype=torch.float64)
    assert list(layer.state_dict()) == list(plain.state_dict())
    assert all(torch.equal(layer.state_dict()[n], v) for n, v in plain.state_dict().items())
    plain.load_state_dict(layer.state_dict())
    layer.load_state_dict(plain.state_dict())
    x = torch.randn(3, 9, 9, dtype=torch.float64)  # one image
    again = pickle.loads(pickle.dumps(copy.deepcopy(layer)))
    assert torch.equal(again(x), layer(x))
    assert torch.equal(
        torch.func.functional_call(layer, dict(layer.named_parameters()), x), layer(x)
    )


@pytest.mark.parametrize("kind", [ConvReLU2d, ConvReLUMaxPool2d])
def test_one_op_computes_them_and_autocast_and_compile_go_through(kind: type[nn.Conv2d]) -> None:
    layer, x = kind(3, 8, 3, padding=1), torch.randn(2, 3, 9, 9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), layer(x))
    assert layer.to(memory_format=torch.channels_last)(x).is_contiguous(
        memory_format=torch.channels_last
    )
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = layer(x)
    index = kind is ConvReLUMaxPool2d
    assert [t.shape for t in saved][2:] == [out.shape]
    assert saved[2].dtype == (torch.uint8 if index else torch.float32)


def test_says_what_it_is() -> None:
    said = repr(ConvReLUMaxPool2d(3, 8, 3, pool_kernel_size=3, pool_stride=(2, 1)))
    assert said == (
        "ConvReLUMaxPool2d(3, 8, kernel_size=(3, 3), stride=(1, 1), pool_kernel_size=(3, 3), "
        "pool_stride=(2, 1), pool_padding=(0, 0))"
    )


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: ConvReLUMaxPool2d(3, 8, 3, pool_kernel_size=0), "pool_kernel_size"),
        (lambda: ConvReLUMaxPool2d(3, 8, 3, pool_stride=(1, 2, 3)), "pool_stride"),
        (lambda: ConvReLUMaxPool2d(3, 8, 3, pool_padding=2), "pool_padding"),
        (lambda: ConvReLUMaxPool2d(3, 8, 3)(torch.randn(3, 3, 3)), "pool_kernel_size"),
        (lambda: ConvReLU2d(3, 8, 3, padding=-1)(torch.randn(3, 9, 9)), "padding"),
        (lambda: ConvReLU2d(3, 8, 3)(torch.randn(2, 4, 9, 9)), "input"),
        (lambda: ConvReLU2d(3, 8, 3, groups=2), "in_channels"),
    ],
)
def test_bad_input_is_named(make: Any, name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}"):
        make()
