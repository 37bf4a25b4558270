"""From padded batches to packed ones and back: flash_attn.bert_padding, in plain torch.

Everything has gradients of any order; `indices` are places in the flattened (batch * seqlen).
"""

from __future__ import annotations

import torch
from torch import Tensor


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """input[indices]."""
    return input.index_select(0, indices)


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """(first_axis_dim, ...), 0 where no index points."""
    put = values.new_zeros(first_axis_dim, *values.shape[1:])
    return put.index_copy_(0, indices, values)


def index_first_axis_residual(input: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """input[indices], and input again, of the same memory."""
    return index_first_axis(input, indices), input.view_as(input)


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Pack the tokens that the masks select.

    Args:
        hidden_states: (batch, seqlen, ...).
        attention_mask: (batch, seqlen), bool or int, 1 for a token.
        unused_mask: the same, 1 for what is packed too, but does not count as used.

    Returns:
        hidden_states packed, (total, ...); indices of the packed, (total,); cu_seqlens,
        (batch + 1,) int32; the longest sequence's length; how many of each sequence are used,
        (batch,) int32.

    Example:
        >>> mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
        >>> packed, indices, cu_seqlens, longest, used = unpad_input(torch.randn(2, 3, 8), mask)
        >>> packed.shape, cu_seqlens.tolist(), longest
        (torch.Size([5, 8]), [0, 2, 5], 3)
    """
    packed = attention_mask if unused_mask is None else attention_mask + unused_mask
    indices = packed.flatten().nonzero().flatten()
    lengths = packed.sum(dim=-1, dtype=torch.int32)
    used = attention_mask.sum(dim=-1, dtype=torch.int32)
    hidden_states = index_first_axis(hidden_states.flatten(0, 1), indices)
    return hidden_states, indices, _starts(lengths), int(lengths.max()), used


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Pack rows that each hold several sequences, one after another.

    Args:
        hidden_states: (batch, seqlen, ...).
        attention_mask_in_length: (batch, seqlen), int: a row's first numbers are the lengths of its
            sequences, all others 0.

    Returns:
        hidden_states packed, (total, ...); indices of the packed, (total,); cu_seqlens of all
        sequences, int32; the longest one's length.
    """
    place = torch.arange(attention_mask_in_length.shape[-1], device=hidden_states.device)
    filled = place < attention_mask_in_length.sum(dim=-1, keepdim=True)
    indices = filled.flatten().nonzero().flatten()
    lengths = attention_mask_in_length[attention_mask_in_length != 0]
    hidden_states = index_first_axis(hidden_states.flatten(0, 1), indices)
    return hidden_states, indices, _starts(lengths), int(lengths.max())


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """The inverse of unpad_input: (batch, seqlen, ...), 0 where nothing was packed."""
    padded = index_put_first_axis(hidden_states, indices, batch * seqlen)
    return padded.unflatten(0, (batch, seqlen))


def _starts(lengths: Tensor) -> Tensor:
    """cu_seqlens of these lengths."""
    ends = lengths.cumsum(0, dtype=torch.int32)
    return torch.cat((ends.new_zeros(1), ends))
