"""A Transformer encoder that classifies sequences (Vaswani et al., "Attention Is All You Need").

Tokens are projected to the model's width, a learned position embedding is added, encoder layers
follow, and the mean over the sequence goes to a linear classifier. Attention is computed block by
block with an online softmax (Dao, "FlashAttention-2"): the matrix of sequence length squared is
never stored. Query, key and value are views of one projection's output, and the attention's
output is laid out so that merging its heads copies nothing.
"""

import torch
from torch import nn
from torch.nn import functional as F

from bigops.functional import scaled_dot_product_attention


class EncoderLayer(nn.Module):
    """`torch.nn.TransformerEncoderLayer(..., batch_first=True)` with bigops' attention.

    Its children are torch's own, created in torch's order: same names, same initial values.
    (B, S, d_model) -> (B, S, d_model).
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        dim_feedforward: int,
        dropout: float,
        norm_first: bool,
    ) -> None:
        super().__init__()
        self.norm_first = norm_first
        self.self_attn = nn.MultiheadAttention(d_model, num_heads, dropout, batch_first=True)
        self.linear1 = nn.Linear(d_model, dim_feedforward)
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(dim_feedforward, d_model)
        self.norm1 = nn.LayerNorm(d_model)
        self.norm2 = nn.LayerNorm(d_model)
        self.dropout1 = nn.Dropout(dropout)
        self.dropout2 = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.norm_first:
            x = x + self._attend(self.norm1(x))
            return x + self._feed_forward(self.norm2(x))
        x = self.norm1(x + self._attend(x))
        return self.norm2(x + self._feed_forward(x))

    def _attend(self, x: torch.Tensor) -> torch.Tensor:
        attn = self.self_attn
        packed = F.linear(x, attn.in_proj_weight, attn.in_proj_bias)
        heads = packed.unflatten(-1, (3, attn.num_heads, attn.head_dim))
        query, key, value = heads.permute(2, 0, 3, 1, 4).unbind()
        out = scaled_dot_product_attention(
            query, key, value, dropout_p=attn.dropout if self.training else 0.0
        )
        return self.dropout1(attn.out_proj(out.transpose(1, 2).flatten(2)))

    def _feed_forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout2(self.linear2(self.dropout(F.relu(self.linear1(x)))))


class Transformer(nn.Module):
    """Encoder classifier; the defaults are the paper's base size.

    The feed-forward layer's activation is ReLU, as in the paper and torch's default. Dropout acts
    where torch's layer has it, on the attention's probabilities too; with dropout above 0 the
    attention of a training step takes whatever path serves dropout, which may be the reference
    (one `FallbackWarning` then says so). In eval mode, and with `dropout=0`, it is the fused one.

    Args:
        in_features: length of one input token.
        num_classes: length of the output row.
        max_length: longest sequence (rows of the position embedding).
        d_model, num_heads, num_layers, dim_feedforward, dropout: as in torch.
        norm_first: normalise before attention and feed-forward instead of after; a last
            normalisation then precedes the mean. The later form (torch's default) needs a
            learning-rate warm-up from about six layers on (Xiong et al., "On Layer Normalization
            in the Transformer Architecture"), this one does not.
        plain: compute with `torch.nn.TransformerEncoderLayer`; parameters keep their names and
            initial values.

    Shapes: tokens (B, S, in_features) with 1 <= S <= max_length -> logits (B, num_classes).

    Example:
        >>> model = Transformer(in_features=16, max_length=49)
        >>> model(torch.randn(8, 49, 16)).shape
        torch.Size([8, 10])
    """

    def __init__(
        self,
        in_features: int = 16,
        num_classes: int = 10,
        max_length: int = 512,
        *,
        d_model: int = 512,
        num_heads: int = 8,
        num_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        norm_first: bool = True,
        plain: bool = False,
    ) -> None:
        super().__init__()
        if num_heads < 1 or d_model % num_heads:
            raise ValueError(f"num_heads must divide d_model, got {num_heads} and {d_model}")
        if not 0.0 <= dropout <= 1.0:
            raise ValueError(f"dropout must be between 0 and 1, got {dropout}")
        self.plain = plain
        self.embedding = nn.Linear(in_features, d_model)
        self.position = nn.Parameter(torch.empty(max_length, d_model))
        nn.init.normal_(self.position, std=0.02)
        layer: nn.Module
        self.layers = nn.ModuleList()
        for _ in range(num_layers):
            if plain:
                layer = nn.TransformerEncoderLayer(
                    d_model,
                    num_heads,
                    dim_feedforward,
                    dropout,
                    batch_first=True,
                    norm_first=norm_first,
                )
            else:
                layer = EncoderLayer(d_model, num_heads, dim_feedforward, dropout, norm_first)
            self.layers.append(layer)
        self.norm = nn.LayerNorm(d_model) if norm_first else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(d_model, num_classes)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        length = self.position.shape[0]
        wanted = self.embedding.in_features
        if tokens.ndim != 3 or tokens.shape[2] != wanted or not 1 <= tokens.shape[1] <= length:
            raise ValueError(
                f"tokens must be (B, S, {wanted}) with 1 <= S <= {length}, "
                f"got {tuple(tokens.shape)}"
            )
        x = self.dropout(self.embedding(tokens) + self.position[: tokens.shape[1]])
        for layer in self.layers:
            x = layer(x)
        return self.classifier(self.norm(x).mean(1))

    def extra_repr(self) -> str:
        return f"plain={self.plain}"
