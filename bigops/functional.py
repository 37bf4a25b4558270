"""The functions of bigops, in the shape of torch.nn.functional."""

from .folding import fold_batch_norm
from .ops.attention import attention
from .ops.batch_norm_act import batch_norm_act
from .ops.combine_attention import combine_attention
from .ops.conv2d_act import conv1d_act, conv2d_act, conv2d_relu
from .ops.conv2d_relu_max_pool2d import conv2d_relu_max_pool2d
from .ops.decode_attention import decode_attention
from .ops.max_pool2d import max_pool2d
from .ops.scaled_dot_product_attention import scaled_dot_product_attention
from .ops.varlen_attention import varlen_attention

__all__ = [
    "attention",
    "batch_norm_act",
    "combine_attention",
    "conv1d_act",
    "conv2d_act",
    "conv2d_relu",
    "conv2d_relu_max_pool2d",
    "decode_attention",
    "fold_batch_norm",
    "max_pool2d",
    "scaled_dot_product_attention",
    "varlen_attention",
]
