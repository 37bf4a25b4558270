"""torch's MultiheadAttention over bigops' attention.

torch copies the projections into one tensor per head and turns masks into a floating one of
(N, H, L, S). Here query, key and value are views of the projections, a padding mask stays (N, 1, 1,
S), and a mask that is said to be causal costs half the work and no memory.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from ..functional import attention, scaled_dot_product_attention


class MultiheadAttention(torch.nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention`: same constructor, parameters, state dict and results.

    Calls with `need_weights=False` take bigops' kernels. What these never have, the weights, comes
    from torch: a call that wants them (torch's default), nested tensors, and calls that torch
    rejects, are torch's own forward.

    Args of forward:
        query: (L, E), (L, N, E), or (N, L, E) with `batch_first`.
        key: (S, kdim), (S, N, kdim), or (N, S, kdim).
        value: (S, vdim), (S, N, vdim), or (N, S, vdim).
        key_padding_mask: (N, S) or (S,); bool: True hides the key, floating: added to its scores.
        need_weights: also return the weights.
        attn_mask: (L, S) or (N * H, L, S); bool: True hides, floating: added. (In
            `bigops.attention` True attends.)
        average_attn_weights: weights averaged over heads.
        is_causal: says that attn_mask, which must be given too, is the causal one; it is not read
            then. torch reads it if there is a key_padding_mask too: that matters to a wrong hint.

    Returns:
        out as query, and the weights or None.

    Raises:
        What torch raises.

    A query that sees no key gives `out_proj`'s bias, as in torch's training; torch's fast path for
    inference gives NaN. Dropout draws its own bits (`bigops.attention`), not torch's. Without
    `batch_first`, out is a transposed view. `torch.nn.TransformerEncoderLayer` does not call its
    attention's forward in inference: `torch.backends.mha.set_fastpath_enabled(False)` makes it.

    Source: Vaswani et al. 2017, "Attention is all you need", 3.2.2.

    Example:
        >>> layer = bigops.nn.MultiheadAttention(512, 8, batch_first=True)
        >>> x = torch.randn(2, 128, 512)
        >>> layer(x, x, x, need_weights=False)[0].shape
        torch.Size([2, 128, 512])
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        tensors = (query, key, value, key_padding_mask, attn_mask)
        if need_weights or not self._takes(*tensors, is_causal=is_causal):
            return super().forward(
                query,
                key,
                value,
                key_padding_mask=key_padding_mask,
                need_weights=need_weights,
                attn_mask=attn_mask,
                average_attn_weights=average_attn_weights,
                is_causal=is_causal,
            )
        q, k, v = (self._split(t) for t in self._projected(query, key, value))
        out = self._attend(q, k, v, key_padding_mask, attn_mask, is_causal)
        out = linear(out.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias)
        if query.dim() == 2:
            return out.squeeze(0), None
        return out if self.batch_first else out.transpose(0, 1), None

    def _takes(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> bool:
        """Whether the call is right, and its tensors are dense."""
        if any(t.is_nested for t in (query, key, value)):
            return False
        if query.dim() not in (2, 3) or not query.dim() == key.dim() == value.dim():
            return False
        sizes = (query.shape[-1], key.shape[-1], value.shape[-1])
        if sizes != (self.embed_dim, self.kdim, self.vdim) or key.shape[:-1] != value.shape[:-1]:
            return False
        batch, rows = self._batch_and_length(query)
        key_batch, keys = self._batch_and_length(key)
        if key_batch != batch or (is_causal and attn_mask is None):
            return False
        padding_shape = (keys,) if query.dim() == 2 else (batch, keys)
        mask_shapes = ((rows, keys), (batch * self.num_heads, rows, keys))
        return _is_mask(key_padding_mask, padding_shape) and _is_mask(attn_mask, *mask_shapes)

    def _batch_and_length(self, x: Tensor) -> tuple[int, int]:
        if x.dim() == 2:
            return 1, x.shape[0]
        return (x.shape[0], x.shape[1]) if self.batch_first else (x.shape[1], x.shape[0])

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """query, key and value projected, in one product where they are one tensor."""
        size, bias = self.embed_dim, self.in_proj_bias
        if self._qkv_same_embed_dim and query is key is value:
            return linear(query, self.in_proj_weight, bias).chunk(3, dim=-1)
        if self._qkv_same_embed_dim and key is value:
            q_weight, kv_weight = self.in_proj_weight.split((size, 2 * size))
            q_bias, kv_bias = (None, None) if bias is None else bias.split((size, 2 * size))
            return linear(query, q_weight, q_bias), *linear(key, kv_weight, kv_bias).chunk(2, -1)
        if self._qkv_same_embed_dim:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None, None, None) if bias is None else bias.chunk(3)
        return tuple(map(linear, (query, key, value), weights, biases))

    def _split(self, x: Tensor) -> Tensor:
        """(N, H, S, D): a view of the projection."""
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        if x.dim() == 3:
            return x.transpose(0, 1).unsqueeze(0)
        return x.transpose(1, 2) if self.batch_first else x.permute(1, 2, 0, 3)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> Tensor:
        """(N, H, L, D)."""
        dropout_p = self.dropout if self.training else 0.0
        batch, heads, rows, _ = query.shape
        keys = key.shape[2]
        if key_padding_mask is not None:
            key_padding_mask = key_padding_mask.view(batch, 1, 1, keys)
            if is_causal and rows == keys and self.bias_k is None and not self.add_zero_attn:
                bias = _seen(key_padding_mask)
                out = attention(query, key, value, causal=True, bias=bias, dropout_p=dropout_p)
                assert isinstance(out, Tensor)
                return out
            is_causal = False
        if is_causal:
            attn_mask = None
        elif attn_mask is not None and attn_mask.dim() == 3:
            attn_mask = attn_mask.view(batch, heads, rows, keys)
        mask = _merged(attn_mask, key_padding_mask)
        if self.bias_k is not None and self.bias_v is not None:
            key, value, mask = _with_one_more(key, value, mask, self.bias_k, self.bias_v)
        if self.add_zero_attn:
            zero = key.new_zeros(self.embed_dim)
            key, value, mask = _with_one_more(key, value, mask, zero, zero)
        seen = None if mask is None else _seen(mask)
        return scaled_dot_product_attention(query, key, value, seen, dropout_p, is_causal)


def _is_mask(mask: Tensor | None, *shapes: tuple[int, ...]) -> bool:
    if mask is None:
        return True
    known = mask.dtype == torch.bool or mask.is_floating_point()
    return known and not mask.is_nested and tuple(mask.shape) in shapes


def _merged(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """One mask that hides what either hides; floating if one is."""
    if first is None or second is None:
        return second if first is None else first
    if first.dtype == second.dtype == torch.bool:
        return first | second
    if first.dtype == torch.bool:
        return torch.where(first, float("-inf"), second)
    if second.dtype == torch.bool:
        return torch.where(second, float("-inf"), first)
    return first + second


def _seen(mask: Tensor) -> Tensor:
    """The mask as bigops' attention takes it: of booleans, True attends there and hides here."""
    return ~mask if mask.dtype == torch.bool else mask


def _with_one_more(
    key: Tensor, value: Tensor, mask: Tensor | None, key_row: Tensor, value_row: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """key and value with a last row that every query sees, given as (..., E)."""
    batch, heads, _, head_size = key.shape

    def longer(x: Tensor, row: Tensor) -> Tensor:
        last = row.to(x.dtype).view(1, heads, 1, head_size).expand(batch, -1, -1, -1)
        return torch.cat((x, last), dim=2)

    mask = None if mask is None else pad(mask, (0, 1))
    return longer(key, key_row), longer(value, value_row), mask
