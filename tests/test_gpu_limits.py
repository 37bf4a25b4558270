"""Rung 7: tensors beyond 2^31 elements, memory that is not taken, and TF32 where torch allows it.

Strides are tried on a CPU too, in every run: memory that nobody touches costs nothing there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from gpu_places import Place, anywhere, gpu_only
from torch import Tensor

import bigops
from bigops import check
from bigops.ops.adam import adam

FAR = 2**31 + 64  # elements


def room_for(device: str, elements: int) -> None:
    """Skip without memory for so many bfloat16 numbers."""
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 2.2 * elements:
        pytest.skip(f"needs {2.2 * elements / 2**30:.0f} GiB of free GPU memory")


def far(t: Tensor) -> Tensor:
    """The same values, the two entries of the first dimension more than 2^31 elements apart."""
    assert t.shape[0] == 2
    storage = torch.empty(FAR + t[0].numel(), dtype=t.dtype, device=t.device)
    return storage.as_strided(t.shape, (FAR, *t[0].contiguous().stride())).copy_(t)


def assert_far_is_near(
    function: Callable[..., Tensor],
    eager: Callable[..., Tensor],
    near: Sequence[Tensor],
    spread: Sequence[Tensor],
    backend: str,
) -> None:
    """By the error rule: what is laid far apart gives what lies near."""

    def run(call: Callable[..., Tensor], inputs: Sequence[Tensor]) -> dict[str, Tensor]:
        leaves = [t.detach().requires_grad_() for t in inputs]
        out = call(*leaves)
        seed = torch.arange(out.numel(), device=out.device).cos().view(out.shape)
        grads = torch.autograd.grad(out, leaves, seed.to(near[0].dtype).to(out.dtype))
        return {"out": out.detach()} | {f"grad{i}": grad for i, grad in enumerate(grads)}

    with bigops.use_backend(backend):
        got = run(function, spread)
    with bigops.use_backend("reference"):
        want = run(function, [t.double() for t in near])
    plain = run(eager, near)
    found = [check.compare(name, got[name], plain[name], want[name]) for name in want]
    assert all(c.ok for c in found), found


@anywhere("attention")
def test_attention_of_batches_far_apart(place: Place) -> None:
    device, backend = place
    room_for(device, 2 * FAR)
    packed = torch.randn(2, 3, 2, 70, 64, device=device, dtype=torch.bfloat16)
    assert_far_is_near(
        lambda q, k, v: bigops.attention(q, k, v, causal=True),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        packed.unbind(1),
        far(packed).unbind(1),
        backend,
    )


@anywhere("conv2d_act", "conv2d_relu_max_pool2d")
@pytest.mark.parametrize("name", ["conv2d_act", "conv2d_relu_max_pool2d"])
def test_convolution_of_images_far_apart(name: str, place: Place) -> None:
    device, backend = place
    room_for(device, 2 * FAR)
    images = torch.randn(2, 16, 18, 20, device=device, dtype=torch.bfloat16)
    weight = torch.randn(32, 16, 3, 3, device=device, dtype=torch.bfloat16) / 12
    op = bigops.ops.get(name)
    near, spread = (images, weight), (far(images), weight)
    assert_far_is_near(op.function, op.eager, near, spread, backend)


@gpu_only("adam")
def test_adam_of_more_than_two_billion_elements(place: Place) -> None:
    """Its ends become what they become as tensors of their own, bit for bit."""
    device, backend = place
    count = 2**31 + 4099
    room_for(device, 5 * count)
    whole = [torch.randn(count, device=device, dtype=torch.bfloat16) for _ in range(4)]
    whole[3].abs_()
    parts = (slice(0, 8192), slice(2**31 - 100, 2**31 + 100), slice(count - 4099, count))
    ends = [[t[part].clone() for part in parts] for t in whole]
    with bigops.use_backend(backend):
        adam(*([t] for t in whole), [], [torch.tensor(2.0)], lr=0.1)
        adam(*ends, [], [torch.tensor(2.0) for _ in parts], lr=0.1)
    for t, alone in zip(whole, ends, strict=True):
        for part, end in zip(parts, alone, strict=True):
            assert torch.equal(t[part], end)


def growth(run: Callable[[], object]) -> int:
    """Bytes by which the peak exceeds what was there before; what `run` returns counts."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = run()
    torch.cuda.synchronize()
    del kept
    return torch.cuda.max_memory_allocated() - before


@gpu_only("attention")
def test_attention_holds_nothing_quadratic(place: Place) -> None:
    query, key, value = (
        torch.randn(1, 4, 8192, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for _ in range(3)
    )
    one = query.numel() * query.element_size()

    def step() -> object:
        out = bigops.attention(query, key, value, causal=True)
        return torch.autograd.grad(out, (query, key, value), torch.ones_like(out))

    with bigops.use_backend(place[1]):
        step()
        # The output, its gradient, three gradients; lse and delta are a sixteenth each. CUDA C++
        # adds grad_query up in float32.
        assert growth(step) <= (5.25 + 2.0 * (place[1] == "native")) * one
    assert 100 * one / 2 < 4 * 8192 * 8192  # a byte per score would be seen


@gpu_only("conv2d_relu_max_pool2d")
def test_pooled_convolution_keeps_its_output_and_a_byte_per_window(place: Place) -> None:
    images = torch.randn(32, 16, 64, 64, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(64, 16, 3, 3, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    windows = 32 * 64 * 32 * 32

    def forward() -> object:
        return bigops.conv2d_relu_max_pool2d(images, weight, padding=1)

    with bigops.use_backend(place[1]):
        forward()
        assert growth(forward) <= (2 + 1) * windows + 4096


@gpu_only("adam", "grad_norm")
def test_adam_takes_no_memory_of_the_parameters_size(place: Place) -> None:
    params = [torch.randn(2**22, device="cuda", requires_grad=True) for _ in range(4)]
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer = bigops.optim.AdamW(params, max_grad_norm=1.0)
    with bigops.use_backend(place[1]):
        optimizer.step()
        # The table of addresses, and a sum for each chunk.
        assert growth(optimizer.step) <= 2**20


@gpu_only("conv2d_act")
def test_tf32_where_torch_allows_it_and_nowhere_else(place: Place) -> None:
    """TF32 cuts both factors of a product to 10 bits, fp32 to none: bounds, not tolerances."""
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this GPU has no TF32")
    images = torch.randn(4, 64, 16, 16, device="cuda")
    weight = torch.randn(64, 64, 3, 3, device="cuda")
    exact = F.conv2d(images.double(), weight.double(), padding=1).relu()
    sizes = F.conv2d(images.abs().double(), weight.abs().double(), padding=1)
    before = torch.backends.cudnn.allow_tf32
    errors = []
    try:
        for allowed in (False, True):
            torch.backends.cudnn.allow_tf32 = allowed
            with bigops.use_backend(place[1]):
                got = bigops.conv2d_relu(images, weight, padding=1)
            errors.append(((got.double() - exact).abs() / sizes).max().item())
    finally:
        torch.backends.cudnn.allow_tf32 = before
    ieee, tf32 = errors
    terms = weight[0].numel()
    assert ieee <= terms * torch.finfo(torch.float32).eps
    assert ieee < tf32 <= 2 * 2**-10 + ieee
