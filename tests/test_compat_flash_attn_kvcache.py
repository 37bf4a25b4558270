"""flash_attn_with_kvcache against the formula over each sequence's own keys, in float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from flash_attn_formula import attend
from torch import Tensor
from truth import assert_as_true

import bigops
from bigops.compat.flash_attn import flash_attn_with_kvcache

B, ROWS, CAPACITY, H, HK, D, R = 3, 5, 48, 4, 2, 32, 16
LENGTHS = torch.tensor([30, 0, 43], dtype=torch.int32)
PICKED = torch.tensor([4, 0, 2], dtype=torch.int32)
PADDING = torch.tensor([11, 0, 1], dtype=torch.int32)
PAGE = 16
CACHES = ("contiguous", "picked", "padded", "picked and padded", "paged")
NEW = (0, 1, 4)
ROTARY = (None, False, True)
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])
OPTIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window_size": (10, 3)},
    "causal window": {"causal": True, "window_size": (7, -1), "softmax_scale": 0.3},
    "slopes and softcap": {"causal": True, "alibi_slopes": SLOPES, "softcap": 2.0},
    "slopes of sequences": {"alibi_slopes": SLOPES * torch.tensor([[1.0], [0.5], [2.0]])},
}


@pytest.fixture(autouse=True)
def _native() -> Iterator[None]:
    """Any other road than the kernels' is an error."""
    with bigops.use_backend("native"):
        yield


def rotated(x: Tensor, cos: Tensor, sin: Tensor, first: int, each: bool, pairs: bool) -> Tensor:
    """x (S, H, D), element by element."""
    places = [first + i * each for i in range(len(x))]
    cos, sin = cos[places][:, None].to(x.dtype), sin[places][:, None].to(x.dtype)
    one, two = (range(0, R, 2), range(1, R, 2)) if pairs else (range(R // 2), range(R // 2, R))
    out = x.clone()
    out[..., one] = x[..., one] * cos - x[..., two] * sin
    out[..., two] = x[..., one] * sin + x[..., two] * cos
    return out


def judge(got: list[Tensor], eager: list[Tensor], want: list[Tensor]) -> None:
    assert_as_true(*([{str(i): t for i, t in enumerate(way)}] for way in (got, eager, want)))


class Case:
    """A cache whose every place that is not to be read is NaN, and the call's arguments."""

    def __init__(self, cache: str, new: int, rotary: bool | None, dtype: torch.dtype) -> None:
        self.rotary = rotary
        self.q = torch.randn(B, 4, H, D).to(dtype)
        self.new = [torch.randn(B, new, HK, D).to(dtype) for _ in range(2)] if new else []
        angles = 7 * torch.rand(CAPACITY + 3, R // 2)
        self.turns = [angles.cos().to(dtype), angles.sin().to(dtype)]
        self.begins = PADDING if "padded" in cache else torch.zeros_like(PADDING)
        self.given: dict[str, Any] = {"cache_seqlens": LENGTHS.clone()}
        if "padded" in cache:
            self.given["cache_leftpad"] = PADDING
        if "picked" in cache:
            self.given["cache_batch_idx"] = PICKED
        self.shape = (ROWS if "picked" in cache else B, CAPACITY)
        row = PICKED if "picked" in cache else torch.arange(B)
        places = torch.arange(CAPACITY)
        self.places = [(row[b].expand(CAPACITY), places) for b in range(B)]
        if cache == "paged":
            self.shape = (11, PAGE)
            table = torch.randperm(11)[: B * 3].view(B, 3)
            self.given["block_table"] = table.int()
            self.places = [(table[b, places // PAGE], places % PAGE) for b in range(B)]
        self.caches = [torch.full((*self.shape, HK, D), math.nan, dtype=dtype) for _ in range(2)]
        for b, part in enumerate(self.parts()):
            for cached in self.caches:
                cached[self.at(b, part)] = torch.randn(len(range(*part)), HK, D).to(dtype)

    def parts(self) -> list[tuple[int, int]]:
        """Where in its own row each sequence lies."""
        return list(zip(self.begins.tolist(), LENGTHS.tolist(), strict=True))

    def at(self, b: int, part: tuple[int, int]) -> tuple[Tensor, Tensor]:
        return self.places[b][0][slice(*part)], self.places[b][1][slice(*part)]

    def call(self, caches: list[Tensor], **options: Any) -> Any:
        if self.rotary is not None:
            options["rotary_cos"], options["rotary_sin"] = self.turns
            options["rotary_interleaved"] = self.rotary
        given = self.given | options
        return flash_attn_with_kvcache(self.q, *caches, *self.new, return_softmax_lse=True, **given)

    def plain(self, dtype: torch.dtype, **options: Any) -> list[Tensor]:
        """out, softmax_lse, and what is appended, of each sequence by itself."""
        outs, lses, appended = [], [], []
        slopes = options.pop("alibi_slopes", None)
        local = options.get("causal", False) or "window_size" in options
        for b, (begin, end) in enumerate(self.parts()):
            q = self.q[b].to(dtype)
            keys, values = (c[self.at(b, (begin, end))].to(dtype) for c in self.caches)
            if self.new:
                k, v = (t[b].to(dtype) for t in self.new)
                if self.rotary is not None:
                    q = rotated(q, *self.turns, end, local, self.rotary)
                    k = rotated(k, *self.turns, end, True, self.rotary)
                keys, values = torch.cat((keys, k)), torch.cat((values, v))
                appended += [k, v]
            own = slopes[b] if slopes is not None and slopes.dim() == 2 else slopes
            out, lse, _ = attend(q[None], keys[None], values[None], alibi_slopes=own, **options)
            outs.append(out)
            lses.append(lse)
        return [torch.cat(outs), torch.cat(lses), *appended]


def bits(t: Tensor) -> Tensor:
    return t.view(torch.int32 if t.dtype == torch.float32 else torch.int16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(
    ("cache", "new", "rotary"),
    [c for c in itertools.product(CACHES, NEW, ROTARY) if c[1] or c[2] is None],
)
def test_cache(
    cache: str, new: int, rotary: bool | None, options: dict[str, Any], dtype: torch.dtype
) -> None:
    """The output, what is appended, and that nothing else is read or written."""
    case = Case(cache, new, rotary, dtype)
    caches = [c.clone() for c in case.caches]
    out, lse = case.call(caches, **options)
    assert out.shape == case.q.shape
    assert torch.equal(case.given["cache_seqlens"], LENGTHS)
    got = [out, lse]
    for b, (_, end) in enumerate(case.parts() if new else ()):
        for c in caches:
            got.append(c[case.at(b, (end, end + new))])
            c[case.at(b, (end, end + new))] = math.nan
    assert all(
        torch.equal(bits(c), bits(before)) for c, before in zip(caches, case.caches, strict=True)
    )
    judge(got, case.plain(dtype, **options), case.plain(torch.float64, **options))
    assert new or (lse[1] == math.inf).all()


@pytest.mark.parametrize("num_splits", [1, 2, 7])
def test_splits(num_splits: int) -> None:
    case = Case("contiguous", 1, True, torch.float32)
    got = case.call([c.clone() for c in case.caches], causal=True, num_splits=num_splits)
    ways = [case.plain(dtype, causal=True)[:2] for dtype in (torch.float32, torch.float64)]
    judge(list(got), *ways)


@pytest.mark.parametrize("length", [17, None])
def test_one_length_for_all(length: int | None) -> None:
    q, k_cache = torch.randn(B, 1, H, D), torch.randn(B, CAPACITY, HK, D)
    v_cache = torch.randn(B, CAPACITY, HK, D)
    out = flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=length)
    assert isinstance(out, Tensor)
    own = q, k_cache[:, :length], v_cache[:, :length]
    judge([out], [attend(*own)[0]], [attend(*(t.double() for t in own))[0]])


def test_no_length_of_pages() -> None:
    """As many keys as the table's pages hold."""
    table = torch.tensor([[3, 1, 0], [2, 4, 5]], dtype=torch.int32)
    q, pool = torch.randn(2, 1, H, D), torch.randn(6, PAGE, HK, D)
    out = flash_attn_with_kvcache(q, pool, pool, block_table=table)
    keys = pool[table].flatten(1, 2)
    wide = keys.double()
    judge([out], [attend(q, keys, keys)[0]], [attend(q.double(), wide, wide)[0]])


def test_padding_in_a_part_of_a_larger_cache() -> None:
    """Sequences that lie apart: written in place, not into a copy."""
    whole = torch.randn(2, B, CAPACITY + 9, HK, D)
    parts, before = whole[:, :, 2 : CAPACITY + 2], whole.clone()
    q, k, v = torch.randn(B, 1, H, D), torch.randn(B, 1, HK, D), torch.randn(B, 1, HK, D)
    given = {"cache_seqlens": LENGTHS, "cache_leftpad": PADDING}
    got = flash_attn_with_kvcache(q, *parts, k, v, **given)
    close = [t.clone() for t in before[:, :, 2 : CAPACITY + 2]]
    assert torch.equal(got, flash_attn_with_kvcache(q, *close, k, v, **given))
    for b in range(B):
        assert torch.equal(parts[:, b, LENGTHS[b]], torch.stack((k[b, 0], v[b, 0])))
        before[:, b, LENGTHS[b] + 2] = parts[:, b, LENGTHS[b]]
    assert torch.equal(whole, before)


def test_has_no_gradient() -> None:
    """As in flash_attn, whatever requires one."""
    q, cache = torch.randn(B, 1, H, D).requires_grad_(), torch.randn(B, CAPACITY, HK, D)
    assert not flash_attn_with_kvcache(q, cache, cache, cache_seqlens=LENGTHS).requires_grad


def test_window_may_be_a_tensor() -> None:
    """flash_attn's own tests give one."""
    q, cache = torch.randn(B, 3, H, D), torch.randn(B, CAPACITY, HK, D)
    got = flash_attn_with_kvcache(q, cache, cache, window_size=torch.tensor([5, 2]))
    assert torch.equal(got, flash_attn_with_kvcache(q, cache, cache, window_size=(5, 2)))


@pytest.mark.parametrize("name", ["cache_batch_idx", "cache_leftpad"])
def test_pages_with_rows_or_padding_are_refused(name: str) -> None:
    case = Case("paged", 0, None, torch.float32)
    with pytest.raises(ValueError, match=f"{name} must be None with a block_table"):
        case.call(case.caches, **{name: PICKED})


def test_layouts_that_padding_cannot_take_are_refused() -> None:
    q, cache = torch.randn(B, 1, H, D), torch.randn(B, CAPACITY, HK, D)
    turned = torch.randn(CAPACITY, B, HK, D).transpose(0, 1)
    given = {"cache_seqlens": LENGTHS, "cache_leftpad": PADDING}
    longer = torch.randn(B, CAPACITY + 1, HK, D)[:, 1:]
    with pytest.raises(ValueError, match="must have k_cache's layout"):
        flash_attn_with_kvcache(q, cache, longer, **given)
    with pytest.raises(ValueError, match="a multiple of rows apart"):
        flash_attn_with_kvcache(q, turned, turned, **given)
