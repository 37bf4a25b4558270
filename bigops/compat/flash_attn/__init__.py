"""The functions of the package flash_attn, over bigops' attention.

    import bigops.compat.flash_attn as flash_attn

is the only change that a program needs: names, arguments, defaults, the (B, S, H, D) layout and
what is returned are those of flash_attn 2.8. More is taken: any device, float32 and float64, values
of another head size than keys', pages of any size, softcap with dropout, gradients through
block_table.

Three things differ. Dropout's bits are those of `bigops.attention`. softmax_lse has a gradient,
which flash_attn drops. With alibi_slopes and causal together it is the log-sum-exp of the scores as
they are documented, where flash_attn's has slope * (i + Sk - Sq) more.

Source: Dao 2023, "FlashAttention-2"; github.com/Dao-AILab/flash-attention, v2.8.3.
"""

from .flash_attn_interface import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)

__version__ = "2.8.3"  # the release whose face this is; programs ask for it

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]
