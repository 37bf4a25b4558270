"""bigops.compat.flash_attn.bert_padding against loops over the tokens."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bigops.compat.flash_attn.bert_padding import (
    index_first_axis,
    index_first_axis_residual,
    index_put_first_axis,
    pad_input,
    unpad_input,
    unpad_input_for_concatenated_sequences,
)

B, S = 4, 7
LENGTHS = [3, 0, 7, 1]


def mask(lengths: list[int], dtype: torch.dtype = torch.int64) -> Tensor:
    return (torch.arange(S) < torch.tensor(lengths)[:, None]).to(dtype)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool])
@pytest.mark.parametrize("shape", [(5,), (2, 3)], ids=str)
def test_unpad_and_pad(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    hidden = torch.randn(B, S, *shape)
    packed, indices, starts, longest, used = unpad_input(hidden, mask(LENGTHS, dtype))
    tokens = [(b, i) for b, n in enumerate(LENGTHS) for i in range(n)]
    assert torch.equal(packed, torch.stack([hidden[token] for token in tokens]))
    assert indices.tolist() == [b * S + i for b, i in tokens]
    assert starts.dtype == used.dtype == torch.int32
    assert starts.tolist() == [0, 3, 3, 10, 11]
    assert used.tolist() == LENGTHS
    assert type(longest) is int
    assert longest == 7
    want = hidden * mask(LENGTHS).view(B, S, *(1 for _ in shape))
    assert torch.equal(pad_input(packed, indices, B, S), want)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_unused_tokens_are_packed_but_not_counted(dtype: torch.dtype) -> None:
    lengths = [n + 2 if n < 5 else n for n in LENGTHS]
    unused = mask(lengths) - mask(LENGTHS)
    hidden = torch.randn(B, S, 5)
    packed, indices, starts, longest, used = unpad_input(
        hidden, mask(LENGTHS, dtype), unused.to(dtype)
    )
    want = unpad_input(hidden, mask(lengths))
    assert torch.equal(packed, want[0])
    assert torch.equal(indices, want[1])
    assert torch.equal(starts, want[2])
    assert longest == want[3]
    assert used.tolist() == LENGTHS


def test_concatenated_sequences() -> None:
    rows = torch.tensor(
        [[2, 3, 0, 0, 0, 0, 0], [0] * S, [7, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0]]
    )
    hidden = torch.randn(B, S, 5)
    packed, indices, starts, longest = unpad_input_for_concatenated_sequences(hidden, rows)
    want = unpad_input(hidden, mask(rows.sum(1).tolist()))
    assert torch.equal(packed, want[0])
    assert torch.equal(indices, want[1])
    assert starts.dtype == torch.int32
    assert starts.tolist() == [0, 2, 5, 12, 13, 14, 15, 16]
    assert longest == 7


INDICES = torch.tensor([5, 0, 3])
FUNCTIONS: dict[str, tuple[Callable[[Tensor], object], tuple[int, ...]]] = {
    "index_first_axis": (lambda x: index_first_axis(x, INDICES), (6, 2, 3)),
    "index_put_first_axis": (lambda x: index_put_first_axis(x, INDICES, 6), (3, 2, 3)),
    "index_first_axis_residual": (lambda x: index_first_axis_residual(x, INDICES), (6, 2, 3)),
    "unpad_input": (lambda x: unpad_input(x, mask(LENGTHS))[0], (B, S, 2)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients(name: str) -> None:
    function, shape = FUNCTIONS[name]
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (x,))
    assert torch.autograd.gradgradcheck(function, (x,))


def test_index_functions() -> None:
    x = torch.randn(6, 2, 3)
    assert torch.equal(index_first_axis(x, INDICES), x[INDICES])
    taken, same = index_first_axis_residual(x, INDICES)
    assert torch.equal(taken, x[INDICES])
    assert torch.equal(same, x)
    assert same.data_ptr() == x.data_ptr()
    put = index_put_first_axis(taken, INDICES, 6)
    assert torch.equal(put[INDICES], taken)
    assert (put[[1, 2, 4]] == 0).all()
