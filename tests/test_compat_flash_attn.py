"""bigops.compat.flash_attn against the formula in float64, and its signatures against a table."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from flash_attn_formula import attend, attend_packed, gradients, pack
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from truth import assert_as_true, nudged

import bigops
import bigops.compat.flash_attn as flash_attn
from bigops.compat.flash_attn import bert_padding, flash_attn_interface

COMMON = (
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, "
    "alibi_slopes=None, deterministic=False, return_attn_probs=False"
)
SEQUENCES = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
SIGNATURES = {
    "flash_attn_func": f"q, k, v, {COMMON}",
    "flash_attn_kvpacked_func": f"q, kv, {COMMON}",
    "flash_attn_qkvpacked_func": f"qkv, {COMMON}",
    "flash_attn_varlen_func": f"q, k, v, {SEQUENCES}, {COMMON}, block_table=None",
    "flash_attn_varlen_kvpacked_func": f"q, kv, {SEQUENCES}, {COMMON}",
    "flash_attn_varlen_qkvpacked_func": f"qkv, cu_seqlens, max_seqlen, {COMMON}",
    "flash_attn_with_kvcache": "q, k_cache, v_cache, k=None, v=None, rotary_cos=None, "
    "rotary_sin=None, cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, "
    "block_table=None, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, "
    "rotary_interleaved=True, alibi_slopes=None, num_splits=0, return_softmax_lse=False",
}
PADDING = {
    "index_first_axis": "input, indices",
    "index_put_first_axis": "values, indices, first_axis_dim",
    "index_first_axis_residual": "input, indices",
    "unpad_input": "hidden_states, attention_mask, unused_mask=None",
    "unpad_input_for_concatenated_sequences": "hidden_states, attention_mask_in_length",
    "pad_input": "hidden_states, indices, batch, seqlen",
}
B, H, HK, D = 2, 4, 2, 32
SLOPES = torch.tensor([[0.5, 0.25, 0.125, 0.0625], [0.3, 0.2, 0.1, 0.0]])
OPTIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "left window": {"window_size": (9, -1)},
    "right window": {"window_size": (-1, 4)},
    "window": {"window_size": (13, 2)},
    "causal window": {"causal": True, "window_size": (6, 3)},
    "scale": {"softmax_scale": 0.3},
    "softcap": {"softcap": 1.5},
    "slopes of heads": {"alibi_slopes": SLOPES[0]},
    "slopes of sequences": {"alibi_slopes": SLOPES},
    "all": {"causal": True, "window_size": (20, -1), "softcap": 2.0, "alibi_slopes": SLOPES,
            "softmax_scale": 0.2},
}  # fmt: skip
FACES = ("separate", "kvpacked", "qkvpacked")

cases = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


@pytest.fixture(autouse=True)
def _native() -> Iterator[None]:
    """Any other road than the kernels' is an error."""
    with bigops.use_backend("native"):
        yield


def rendered(function: Callable[..., Any]) -> str:
    parameters = inspect.signature(function).parameters.values()
    assert all(p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for p in parameters)
    return ", ".join(
        p.name if p.default is inspect.Parameter.empty else f"{p.name}={p.default!r}"
        for p in parameters
    )


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name: str) -> None:
    assert rendered(getattr(flash_attn, name)) == SIGNATURES[name]
    assert getattr(flash_attn, name) is getattr(flash_attn_interface, name)


@pytest.mark.parametrize("name", PADDING)
def test_signature_of_padding(name: str) -> None:
    assert rendered(getattr(bert_padding, name)) == PADDING[name]


def call(face: str, q: Tensor, k: Tensor, v: Tensor, *packing: Any, **options: Any) -> Any:
    """A function of a packed face, whose packed tensor is made of q, k, v."""
    functions = {
        (face, 0): getattr(flash_attn, f"flash_attn_{face}_func", flash_attn.flash_attn_func),
        (face, 4): getattr(
            flash_attn, f"flash_attn_varlen_{face}_func", flash_attn.flash_attn_varlen_func
        ),
    }
    function = functions[face, len(packing)]
    if face == "separate":
        return function(q, k, v, *packing, **options)
    if face == "kvpacked":
        return function(q, torch.stack((k, v), -3), *packing, **options)
    return function(torch.stack((q, k, v), -3), *packing[::2], **options)


def named(*tensors: Tensor) -> dict[str, Tensor]:
    return dict(
        zip(("out", "softmax_lse", "grad of q", "grad of k", "grad of v"), tensors, strict=False)
    )


def check_face(
    face: str,
    shapes: list[tuple[int, ...]],
    dtype: torch.dtype,
    formula: Callable[..., Any],
    *packing: Any,
    **options: Any,
) -> None:
    """out, softmax_lse and all gradients, of q, k, v of these shapes."""

    def run(function: Callable[..., Any], leaves: list[Tensor]) -> dict[str, Tensor]:
        own = [t.clone().requires_grad_() for t in leaves]
        out, lse = function(*own)[:2]
        return named(out, lse, *gradients((out, lse), own))

    def ours(*own: Tensor) -> Any:
        return call(face, *own, *packing, return_attn_probs=True, **options)

    def plain(*own: Tensor) -> Any:
        return formula(*own, *packing[:2], **options)

    draws = [[torch.randn(shape).to(dtype) for shape in shapes] for _ in range(3)]
    got = [run(ours, leaves) for leaves in draws]
    eager = [run(plain, leaves) for leaves in draws]
    want = [run(plain, [t.double() for t in leaves]) for leaves in draws]
    moved = [lambda leaves=leaves: run(plain, list(map(nudged, leaves))) for leaves in draws]
    assert_as_true(got, eager, want, moved)
    assert got[0]["softmax_lse"].dtype == torch.float32
    alone = call(face, *draws[0], *packing, **options)
    assert torch.equal(alone, got[0]["out"])
    assert torch.equal(call(face, *draws[0], *packing, deterministic=True, **options), alone)


@dtypes
@cases
@pytest.mark.parametrize("face", FACES)
def test_padded(face: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    rows, keys = (41, 41) if face == "qkvpacked" else (27, 50)
    heads = H if face == "qkvpacked" else HK
    shapes = [(B, rows, H, D), (B, keys, heads, D), (B, keys, heads, D)]
    check_face(face, shapes, dtype, attend, **options)


@pytest.mark.parametrize("size", [8, 33, 256])
@pytest.mark.parametrize("options", [{"causal": True}, {"window_size": (3, 5)}], ids=str)
def test_rows_that_see_nothing_and_head_sizes(options: dict[str, Any], size: int) -> None:
    shapes = [(B, 50, H, size), (B, 20, HK, size), (B, 20, HK, size)]
    check_face("separate", shapes, torch.float32, attend, **options)
    q, k, v = map(torch.randn, shapes)
    out, lse, _ = flash_attn.flash_attn_func(q, k, v, return_attn_probs=True, **options)
    blind = attend(q, k, v, **options)[1] == math.inf
    assert blind.any()
    assert not blind.all()
    assert torch.equal(lse == math.inf, blind)
    assert (out.transpose(1, 2)[blind] == 0).all()


def test_values_of_another_head_size() -> None:
    shapes = [(B, 30, HK, size) for size in (48, 48, 32)]
    check_face("separate", shapes, torch.float32, attend, causal=True)


@dtypes
@cases
@pytest.mark.parametrize("face", FACES)
def test_packed(face: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    """Sequences without queries, without keys, without both, and without neither."""
    q_lengths, k_lengths = [0, 23, 5, 0, 31], [7, 40, 0, 0, 20]
    if face == "qkvpacked":
        k_lengths = q_lengths
    if options.get("alibi_slopes") is SLOPES:
        options = options | {"alibi_slopes": SLOPES.repeat(3, 1)[:5]}
    heads = H if face == "qkvpacked" else HK
    starts = [torch.tensor([0, *lengths]).cumsum(0).int() for lengths in (q_lengths, k_lengths)]
    packing = (*starts, max(q_lengths), max(k_lengths))
    keys = (sum(k_lengths), heads, D)
    check_face(
        face, [(sum(q_lengths), H, D), keys, keys], dtype, attend_packed, *packing, **options
    )


def pages(k: Tensor, starts: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """k (Tk, ...) in shuffled pages, and the table; what no sequence has is NaN, or
    no page."""
    sequences = [k[starts[b] : starts[b + 1]] for b in range(len(starts) - 1)]
    counts = [-(-len(s) // size) for s in sequences]
    numbers = torch.randperm(sum(counts) + 3).tolist()
    table = torch.full((len(sequences), max(counts) + 1), 2**30, dtype=torch.int32)
    pool = torch.full((len(numbers), size, *k.shape[1:]), math.nan, dtype=k.dtype)
    for b, sequence in enumerate(sequences):
        for i, page in enumerate(sequence.split(size) if len(sequence) else ()):
            table[b, i] = numbers.pop()
            pool[table[b, i], : len(page)] = page
    return pool, table


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("q_lengths", [[1] * 5, [3] * 5, [0, 23, 5, 0, 31]], ids=str)
def test_block_table(q_lengths: list[int], options: dict[str, Any]) -> None:
    """With as many queries of each sequence pages are read in place, else gathered."""
    if options.get("alibi_slopes") is SLOPES:
        options = options | {"alibi_slopes": SLOPES.repeat(3, 1)[:5]}
    q, starts_q, longest_q = pack([torch.randn(n, H, D) for n in q_lengths])
    k, starts_k, longest_k = pack([torch.randn(n, HK, D) for n in (7, 40, 0, 1, 21)])
    v = torch.randn(k.shape)
    packing = (starts_q, starts_k, longest_q, longest_k)
    torch.manual_seed(3)
    k_pages, table = pages(k, starts_k, 8)
    torch.manual_seed(3)
    v_pages, _ = pages(v, starts_k, 8)
    got = flash_attn.flash_attn_varlen_func(
        q, k_pages, v_pages, *packing, return_attn_probs=True, block_table=table, **options
    )
    assert got[2].numel() == 0
    eager = attend_packed(q, k, v, starts_q, starts_k, **options)
    want = attend_packed(q.double(), k.double(), v.double(), starts_q, starts_k, **options)
    assert_as_true([named(*got[:2])], [named(*eager)], [named(*want)])


def test_block_table_with_gradients() -> None:
    q, starts_q, longest_q = pack([torch.randn(n, H, D) for n in (2, 2, 2)])
    k, starts_k, longest_k = pack([torch.randn(n, HK, D) for n in (7, 30, 12)])
    torch.manual_seed(3)
    pool, table = pages(k, starts_k, 8)
    packing = (starts_q, starts_k, longest_q, longest_k)

    def grads(key: Tensor, **more: Any) -> list[Tensor]:
        leaves = [q.clone().requires_grad_(), key.clone().requires_grad_()]
        out = flash_attn.flash_attn_varlen_func(leaves[0], leaves[1], leaves[1], *packing, **more)
        return gradients((out,), leaves)

    (grad_q, grad_pool), (want_q, want_k) = grads(pool, block_table=table), grads(k)
    assert torch.equal(grad_q, want_q)
    torch.manual_seed(3)
    assert torch.equal(grad_pool, pages(want_k, starts_k, 8)[0].nan_to_num(0.0))


P = 0.3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout(dtype: torch.dtype) -> None:
    """What S_dmask says is dropped is dropped, and nothing else; the weights are those before."""
    q, k, v = (
        torch.randn(B, n, heads, D).to(dtype) for n, heads in ((70, H), (150, HK), (150, HK))
    )
    leaves = [q, k, v]
    torch.manual_seed(5)
    out, _, masks = flash_attn.flash_attn_func(*leaves, P, causal=True, return_attn_probs=True)
    torch.manual_seed(5)
    assert torch.equal(out, flash_attn.flash_attn_func(*leaves, P, causal=True))
    assert masks.shape == (B, H, 128, 256)
    assert masks.dtype == dtype
    assert (masks[:, :, 70:] == 0).all()
    assert (masks[..., 150:] == 0).all()
    masks = masks[:, :, :70, :150]
    weights = [attend(*(t.to(d) for t in leaves), causal=True)[2] for d in (dtype, torch.float64)]
    ways = masks.abs(), weights[0].to(dtype), weights[1]
    assert_as_true(*([{"weights": t}] for t in ways))
    seen = weights[1] > 1e-6
    rate, count = (masks[seen] > 0).double().mean().item(), int(seen.sum())
    assert abs(rate - (1 - P)) < 4 * math.sqrt(P * (1 - P) / count)
    kept = ~torch.signbit(masks) * (65536 / (65536 - round(65536 * P)))

    def run(function: Callable[..., Any], leaves: list[Tensor], *more: Any) -> Any:
        own = [t.clone().requires_grad_() for t in leaves]
        torch.manual_seed(5)
        found = function(*own, *more, causal=True, **({} if more else {"kept": kept}))
        out = found if isinstance(found, Tensor) else found[0]
        return [named(out, torch.zeros(0), *gradients((out,), own))]

    assert_as_true(
        run(flash_attn.flash_attn_func, leaves, P),
        run(attend, leaves),
        run(attend, [t.double() for t in leaves]),
        [lambda: run(attend, list(map(nudged, leaves)))[0]],
    )
    twice = [flash_attn.flash_attn_func(*leaves, P, causal=True) for _ in range(2)]
    assert not torch.equal(*twice)


def test_dropout_drops_the_same_packed_and_padded() -> None:
    lengths = [40, 130, 3]
    packed, starts, longest = pack([torch.randn(n, H, D) for n in lengths])
    padded = torch.zeros(3, longest, H, D)
    for b, n in enumerate(lengths):
        padded[b, :n] = packed[starts[b] : starts[b + 1]]
    torch.manual_seed(5)
    options = {"dropout_p": P, "causal": True, "return_attn_probs": True}
    packing = (starts, starts, longest, longest)
    out, lse, masks = flash_attn.flash_attn_varlen_func(*[packed] * 3, *packing, **options)
    assert masks.shape == (3, H, 256, 256)
    torch.manual_seed(5)
    want, want_lse, want_masks = flash_attn.flash_attn_func(*[padded] * 3, **options)
    for b, n in enumerate(lengths):
        rows = slice(starts[b], starts[b + 1])
        assert torch.equal(masks[b, :, :n, :n] < 0, want_masks[b, :, :n, :n] < 0)
        torch.testing.assert_close(out[rows], want[b, :n])
        torch.testing.assert_close(lse[:, rows], want_lse[b, :, :n])
        assert (masks[b, :, n:] == 0).all()


class Operators(TorchDispatchMode):
    """Which ones run, and the last one's arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.arguments: tuple[Any, ...] = ()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.names.add(func._schema.name)
            self.arguments = args
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("face", FACES)
def test_layouts_are_views(face: str) -> None:
    """Nothing but the kernel runs, and what it returns lies as flash_attn's."""
    packed = torch.randn(B, 40, 3, H, D)
    q, kv = packed[:, :, 0], packed[:, :, 1:]
    with Operators() as seen:
        if face == "separate":
            out = flash_attn.flash_attn_func(q, *kv.unbind(2))
        elif face == "kvpacked":
            out = flash_attn.flash_attn_kvpacked_func(q, kv)
        else:
            out = flash_attn.flash_attn_qkvpacked_func(packed)
    assert seen.names <= {"bigops::attention", "aten::empty_like", "aten::new_empty"}
    assert out.is_contiguous()


@pytest.mark.parametrize("deterministic", [False, True])
def test_deterministic_is_passed_on(deterministic: bool) -> None:
    """The CPU's kernels are so anyway: this is seen by the op's last argument."""
    q = torch.randn(B, 20, H, D)
    starts = torch.tensor([0, 7, 20], dtype=torch.int32)
    packing = (starts, starts, 13, 13)
    for function, arguments in (
        (flash_attn.flash_attn_func, (q, q, q)),
        (flash_attn.flash_attn_varlen_func, (q[0], q[0], q[0], *packing)),
    ):
        with Operators() as seen:
            function(*arguments, deterministic=deterministic)
        assert seen.arguments[-1:] == (True,) if deterministic else seen.arguments[-1:] != (True,)


def test_compiles_without_a_break() -> None:
    q, k, v = torch.randn(3, B, 20, H, D).unbind()
    starts = torch.tensor([0, 7, 20], dtype=torch.int32)

    def both(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        padded = flash_attn.flash_attn_func(q, k, v, causal=True, window_size=(5, 0))
        packing = (starts, starts, 13, 13)
        return flash_attn.flash_attn_varlen_func(padded[0], k[0], v[0], *packing, causal=True)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v), both(q, k, v))


def test_slopes_that_require_a_gradient_stay_fast() -> None:
    """As in flash_attn they have none."""
    q, k, v = torch.randn(3, B, 20, H, D).unbind()
    slopes = SLOPES.clone().requires_grad_()
    out = flash_attn.flash_attn_func(q.requires_grad_(), k, v, alibi_slopes=slopes)
    out.sum().backward()
    assert slopes.grad is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.randn(20, H, D),) * 3, "q must have 4 dimensions"),
        ((torch.randn(B, 20, H, D), [1.0], torch.randn(B, 20, H, D)), "k must be a torch.Tensor"),
        ((torch.randn(B, 20, H, D),) * 2 + (torch.randn(B, 19, H, D),), "value must have"),
        ((torch.randn(B, 20, H, D),) * 3 + (1.5,), "dropout_p must be"),
    ],
    ids=str,
)
def test_illegal(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        flash_attn.flash_attn_func(*arguments)
