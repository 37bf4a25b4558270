"""fold_batch_norm: a batch normalisation in the convolution before it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from truth import assert_as_true

from bigops import fold_batch_norm
from bigops.nn import ConvReLU2d

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def _pair(dims: int = 2, affine: bool = True, **options: Any) -> tuple[Any, Any]:
    """A convolution and a batch normalisation that has seen data."""
    torch.manual_seed(dims)
    conv = CONVS[dims](4, 12, 3, **{"padding": 1, **options})
    bn = NORMS[dims](12, eps=1e-3, affine=affine)
    if affine:
        nn.init.uniform_(bn.weight, -2, 2)
        nn.init.normal_(bn.bias)
    with torch.no_grad():
        for _ in range(3):
            bn(conv(3 * torch.randn(8, 4, *[9] * dims)) + 0.5)
    return conv.eval(), bn.eval()


def _image(dims: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(4, 4, *[11] * dims).to(dtype)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("affine", "options"),
    [
        (True, {}),
        (False, {"bias": False}),
        (True, {"groups": 4, "bias": False, "stride": 2, "padding_mode": "reflect"}),
        (True, {"padding": "same", "dilation": 2}),
    ],
)
def test_folded_computes_what_both_do(
    dims: int, dtype: torch.dtype, affine: bool, options: dict[str, Any]
) -> None:
    conv, bn = (m.to(dtype) for m in _pair(dims, affine, **options))
    wide_conv, wide_bn = (copy.deepcopy(m).double() for m in (conv, bn))
    x = _image(dims, dtype)
    folded = fold_batch_norm(conv, bn)
    assert type(folded) is CONVS[dims]
    assert {p.dtype for p in folded.parameters()} == {dtype}
    with torch.no_grad():
        got, eager, want = folded(x), bn(conv(x)), wide_bn(wide_conv(x.double()))
    if dtype == torch.float64:  # in which want is no truer than got
        torch.testing.assert_close(got, eager)
    else:
        assert_as_true([{"out": got}], [{"out": eager}], [{"out": want}])


def test_values_are_rounded_once() -> None:
    conv, bn = _pair()
    scale = bn.weight.double() / (bn.running_var.double() + bn.eps).sqrt()
    weight = conv.weight.double() * scale.view(-1, 1, 1, 1)
    bias = (conv.bias.double() - bn.running_mean.double()) * scale + bn.bias.double()
    exact = fold_batch_norm(copy.deepcopy(conv).double(), copy.deepcopy(bn).double())
    torch.testing.assert_close(exact.weight, weight)
    torch.testing.assert_close(exact.bias, bias)
    found = fold_batch_norm(conv, bn)
    assert torch.equal(found.weight, weight.float())
    assert torch.equal(found.bias, bias.float())
    # A normalisation in float32 after a convolution in bfloat16 is usual.
    low = fold_batch_norm(copy.deepcopy(conv).bfloat16(), bn)
    assert low.weight.dtype == low.bias.dtype == torch.bfloat16


def test_gradients_reach_the_folded_values_and_the_input() -> None:
    conv, bn = _pair()
    folded = fold_batch_norm(conv, bn)
    x = _image(2, torch.float32)
    one, other = (x.clone().requires_grad_() for _ in range(2))
    folded(one).square().sum().backward()
    bn(conv(other)).square().sum().backward()
    torch.testing.assert_close(one.grad, other.grad)
    # d bias is the sum over the output's gradient, as bn.bias' is.
    torch.testing.assert_close(folded.bias.grad, bn.bias.grad)
    assert folded.weight.grad is not None
    conv.requires_grad_(False)
    assert not any(p.requires_grad for p in fold_batch_norm(conv, bn).parameters())


def test_nothing_is_changed_nor_shared() -> None:
    conv, bn = _pair()
    conv.train()
    bn.train()
    before = copy.deepcopy((conv.state_dict(), bn.state_dict()))
    generator = torch.get_rng_state()
    folded = fold_batch_norm(conv, bn)
    assert torch.equal(torch.get_rng_state(), generator)
    assert folded.training
    with torch.no_grad():
        for parameter in folded.parameters():
            parameter.zero_()
    for module, old in zip((conv, bn), before, strict=True):
        assert module.training
        assert all(torch.equal(v, old[n]) for n, v in module.state_dict().items())
    assert not fold_batch_norm(conv.eval(), bn).training


def test_parametrized_and_synchronised_layers_fold() -> None:
    conv, bn = _pair()
    normed = nn.utils.parametrizations.weight_norm(copy.deepcopy(conv))
    found = fold_batch_norm(normed, nn.SyncBatchNorm.convert_sync_batchnorm(bn))
    torch.testing.assert_close(found.weight, fold_batch_norm(conv, bn).weight)
    assert type(found) is nn.Conv2d


CONV, BN = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)


@pytest.mark.parametrize(
    ("conv", "bn", "kind", "said"),
    [
        (nn.Linear(3, 8), BN, TypeError, "conv must be a Conv1d"),
        (nn.ConvTranspose2d(3, 8, 3), BN, TypeError, "conv must be a Conv1d"),
        (ConvReLU2d(3, 8, 3), BN, TypeError, "conv must compute a convolution and nothing else"),
        (nn.LazyConv2d(8, 3), BN, ValueError, "conv must be initialised"),
        (nn.Conv2d(3, 8, 3, dtype=torch.cfloat), BN, ValueError, "conv must be floating"),
        (CONV, nn.LayerNorm(8), TypeError, "bn must be a batch normalisation"),
        (CONV, nn.BatchNorm1d(8), TypeError, "bn must take the output of Conv2d"),
        (CONV, nn.BatchNorm2d(9), ValueError, "bn must have conv's 8 output channels, got 9"),
        (CONV, nn.BatchNorm2d(8, device="meta"), ValueError, "bn must be on conv's device"),
        (
            CONV,
            nn.BatchNorm2d(8, track_running_stats=False),
            ValueError,
            "bn must have running statistics",
        ),
    ],
)
def test_bad_input_is_named(conv: Any, bn: Any, kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=f"^{said}"):
        fold_batch_norm(conv, bn)
