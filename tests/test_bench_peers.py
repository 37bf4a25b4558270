"""Peers: what each adapter hands to its package, and that a peer which errs is not timed.

The packages are not here: modules of the same face stand in for them, which record the call and
compute it with torch.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bigops.bench import agreement, ceilings, peers, records
from bigops.bench.cases import OpCase
from bigops.bench.ceilings import Ceilings
from bigops.bench.models import ModelCase, cnn
from bigops.bench.optimizers import AdamCase
from bigops.bench.peers import ADAPTERS
from bigops.bench.peers.adapter import Adapter
from bigops.bench.records import Effort
from bigops.ops import Sample, get

HALF = torch.bfloat16
ATTENTION = get("attention")


def adapter(name: str, op: str = "attention") -> Adapter:
    return next(a for a in ADAPTERS if a.name == name and op in a.ops)


def module(monkeypatch: pytest.MonkeyPatch, name: str, **content: Any) -> None:
    """A stand-in for the package `name`, with its parents."""
    parts = name.split(".")
    for count in range(1, len(parts) + 1):
        made = ModuleType(".".join(parts[:count]))
        made.__path__ = []
        monkeypatch.setitem(sys.modules, made.__name__, made)
    vars(made).update(content)


def heads_inside(seen: list[Any], tupled: bool = False) -> Any:
    """flash_attn_func over (B, S, H, D), causal aligned bottom-right."""

    def flash_attn_func(
        q: Tensor, k: Tensor, v: Tensor, softmax_scale: Any = None, causal: bool = False
    ) -> Any:
        seen.append((q, k, v, softmax_scale, causal))
        query, key, value = (t.transpose(1, 2) for t in (q, k, v))
        out = ATTENTION.eager(query, key, value, causal=causal, scale=softmax_scale)
        return (out.transpose(1, 2), None) if tupled else out.transpose(1, 2)

    return flash_attn_func


def call(rows: int = 6, columns: int = 6, **kwargs: Any) -> Any:
    query = torch.randn(2, 4, rows, 8, requires_grad=True)
    key, value = (torch.randn(2, 2, columns, 8, requires_grad=True) for _ in range(2))
    return (query, key, value), kwargs


def agrees(one: Adapter, given: Any, op: str = "attention") -> None:
    wanted = agreement.expected(get(op).eager, given)
    assert agreement.disagreement(one.load(), one.prepare, wanted) is None


@pytest.mark.parametrize(
    ("version", "name", "tupled"),
    [
        (2, "flash_attn", False),
        (3, "flash_attn_interface", False),
        (3, "flash_attn_interface", True),
        (4, "flash_attn.cute", True),
    ],
)
def test_flash_attention(
    version: int, name: str, tupled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    module(monkeypatch, name, flash_attn_func=heads_inside(seen, tupled))
    agrees(adapter(f"FlashAttention {version}"), call(5, 7, causal=True, scale=0.3))
    q, k, v, scale, causal = seen[0]
    assert (scale, causal) == (0.3, True)
    assert [t.shape for t in (q, k, v)] == [(2, 5, 4, 8), (2, 7, 2, 8), (2, 7, 2, 8)]
    assert all(t.is_contiguous() and t.requires_grad for t in (q, k, v))


def test_flag_gems(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def sdpa(*args: Tensor, **kwargs: Any) -> Tensor:
        seen.append(kwargs)
        return F.scaled_dot_product_attention(*args, **kwargs)

    module(monkeypatch, "flag_gems.ops", scaled_dot_product_attention=sdpa, conv2d=F.conv2d)
    agrees(adapter("FlagGems"), call(causal=True, scale=0.3))
    assert seen[0] == {"is_causal": True, "scale": 0.3, "enable_gqa": True}
    image, weight = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3, requires_grad=True)
    agrees(adapter("FlagGems", "conv2d_act"), ((image, weight), {"padding": 1}), "conv2d_act")


def test_flex_gets_a_mask_and_no_causal(monkeypatch: pytest.MonkeyPatch) -> None:
    flex = adapter("flex")
    assert flex.prepare is not None
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    no_grad = tuple(t.detach() for t in call(40, 70)[0])
    agrees(flex, (no_grad, {"causal": True, "scale": 0.3}))
    _, options = flex.prepare((no_grad, {"causal": True}))
    assert set(options) == {"block_mask", "enable_gqa"}
    _, again = flex.prepare((no_grad, {"causal": True}))
    assert again["block_mask"] is options["block_mask"]


def test_a_backend_of_sdpa_is_the_only_one_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends

    allowed: list[Any] = []
    monkeypatch.setattr(
        ATTENTION, "eager", lambda *_, **__: allowed.append(_cur_sdpa_kernel_backends())
    )
    for name, backend in (("flash", "FLASH"), ("efficient", "EFFICIENT"), ("cudnn", "CUDNN")):
        adapter(f"sdpa {name}").load()()
        assert allowed[-1] == [getattr(SDPBackend, f"{backend}_ATTENTION")]
    assert len(_cur_sdpa_kernel_backends()) > 1


class FusedAdam(torch.optim.Adam):
    """apex's face over torch's step."""

    def __init__(self, params: Any, adam_w_mode: bool = True, **options: Any) -> None:
        super().__init__(params, decoupled_weight_decay=adam_w_mode, **options)


def _adam(decoupled: bool, **options: Any) -> AdamCase:
    def make(device: str, dtype: torch.dtype) -> Any:
        lists = [[torch.randn(50, dtype=dtype) for _ in range(3)] for _ in range(2)]
        return (*lists, [], [], [], []), {"decoupled_weight_decay": decoupled, **options}

    return AdamCase(get("adam"), Sample("three", make), torch.float32, "cpu")


@pytest.mark.parametrize("decoupled", [True, False])
def test_apex_is_an_optimizer(decoupled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module(monkeypatch, "apex.optimizers", FusedAdam=FusedAdam)
    monkeypatch.setattr(peers, "ADAPTERS", [replace(adapter("apex", "adam"), devices=("cpu",))])
    case = _adam(decoupled, weight_decay=0.1, beta1=0.8, max_grad_norm=1.0)
    assert case.peers() == ("foreach", "fused", "apex")
    for name in case.peers():
        assert case.disagreement(name) is None


def test_an_optimizer_that_errs_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Confused(FusedAdam):
        def __init__(self, params: Any, adam_w_mode: bool = True, **options: Any) -> None:
            super().__init__(params, adam_w_mode=not adam_w_mode, **options)

    module(monkeypatch, "apex.optimizers", FusedAdam=Confused)
    monkeypatch.setattr(peers, "ADAPTERS", [replace(adapter("apex", "adam"), devices=("cpu",))])
    assert "update 0 is off by" in str(_adam(True, weight_decay=0.1).disagreement("apex"))


def test_model_flags_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    case = ModelCase(cnn(4), "cpu")
    assert [case.disagreement(name) for name in case.peers()] == [None, None]
    sgd = torch.optim.SGD
    monkeypatch.setattr(
        torch.optim,
        "SGD",
        lambda p, lr, fused, **rest: sgd(p, lr=lr * (9.0 if fused else 1.0), **rest),
    )
    assert case.disagreement("channels_last") is None
    assert "loss 1 is off by" in str(case.disagreement("fused"))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda q, k, v, **kw: ATTENTION.eager(q, k, v), "output 0 is off by"),
        (lambda q, k, v, **kw: ATTENTION.eager(q, k, v, causal=True, scale=1.0), "off by"),
        (lambda q, k, v, **kw: ATTENTION.eager(q, k, v, **kw).transpose(1, 2), "has shape"),
        (lambda q, k, v, **kw: ATTENTION.eager(q, k, v.detach(), **kw), "it gives output 0, grad"),
        (
            lambda q, k, v, **kw: ATTENTION.eager(q.detach() + 0 * q, k, v, **kw),
            "gradient 0 is off",
        ),
        (lambda q, k, v, **kw: ATTENTION.eager(q, k, v, **kw) * torch.nan, "off by inf"),
    ],
    ids=["no mask", "scale", "layout", "no gradient", "wrong gradient", "NaN"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_who_computes_something_else_is_found(change: Any, reason: str, dtype: torch.dtype) -> None:
    (query, key, value), _ = call(64, 64)
    leaves = tuple(t.detach().to(dtype).requires_grad_() for t in (query, key, value))
    wanted = agreement.expected(ATTENTION.eager, (leaves, {"causal": True}))
    assert reason in str(agreement.disagreement(change, None, wanted))
    assert agreement.disagreement(ATTENTION.eager, None, wanted) is None


def test_less_exact_is_not_something_else() -> None:
    wanted = agreement.expected(ATTENTION.eager, call(64, 64, causal=True))

    def rounded(*args: Tensor, **kwargs: Any) -> Tensor:
        """Off by 500 times float32's spacing."""
        return ATTENTION.eager(*(t * (1.0 + 2.0**-14) for t in args), **kwargs)

    assert agreement.disagreement(rounded, None, wanted) is None


SMALL = Sample(
    "small", lambda device, dtype: (tuple(torch.randn(3, 1, 2, 16, 8, dtype=dtype).unbind()), {})
)


def _measured(
    monkeypatch: pytest.MonkeyPatch, function: Any, compiles: bool = False, **effort: Any
) -> tuple[dict[str, Any], Effort]:
    one = Adapter("other", ("attention",), lambda: function, devices=("cpu",), compiles=compiles)
    monkeypatch.setattr(peers, "ADAPTERS", [one])
    monkeypatch.setattr(ceilings, "BUDGET", 0.005)
    monkeypatch.setattr(ceilings, "PRODUCT_SIZES", {"cpu": (64,)})
    given = Effort(**({"seconds": 0.01, "compile_seconds": 0.0} | effort))
    case = OpCase(ATTENTION, SMALL, torch.float32, "cpu")
    return records.measure(case, Ceilings("cpu"), given)[0], given


def test_a_peer_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    record, effort = _measured(monkeypatch, ATTENTION.eager)
    assert record["peers_ms"]["other"] > 0.0
    assert effort.notes == []


def test_a_peer_that_errs_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def errs(*args: Tensor, **kwargs: Any) -> Tensor:
        calls.append(1)
        return ATTENTION.eager(*args, **kwargs) * 0.0

    record, effort = _measured(monkeypatch, errs)
    assert record["peers_ms"]["other"] is None
    assert record["best_name"] == "eager"
    assert effort.notes[0].startswith("attention small float32: other computes something else: its")
    assert len(calls) == 3  # two draws, and the call that shows whether it runs


def test_a_peer_that_raises_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(*_: Tensor) -> Tensor:
        raise NotImplementedError("not today\nnor tomorrow")

    record, effort = _measured(monkeypatch, raises)
    assert record["peers_ms"]["other"] is None
    assert effort.notes == ["attention small float32: other cannot: not today"]


def test_a_peer_that_compiles_takes_of_the_seconds_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    record, effort = _measured(monkeypatch, ATTENTION.eager, compiles=True)
    assert record["peers_ms"] == {"eager": record["eager_ms"], "compile": None, "other": None}
    assert effort.not_compiled == ["attention small float32"]
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    record, effort = _measured(monkeypatch, ATTENTION.eager, compiles=True, compile_seconds=9.0)
    assert record["peers_ms"]["other"] > 0.0
    assert effort.compile_seconds < 9.0


@pytest.mark.parametrize(
    ("name", "sm", "dtype", "reason"),
    [
        ("FlashAttention 2", 90, HALF, "flash-attn is not installed"),
        ("FlashAttention 2", 75, HALF, "needs sm_80 or newer"),
        ("FlashAttention 3", 80, HALF, "needs sm_90"),
        ("FlashAttention 4", 100, torch.float32, "no float32"),
        ("FlagGems", 90, torch.float32, "flag-gems is not installed"),
        ("sdpa cudnn", 90, torch.float32, "no float32"),
        ("sdpa efficient", 75, torch.float32, None),
    ],
)
def test_why_a_peer_is_not_there(
    name: str, sm: int, dtype: torch.dtype, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: divmod(sm, 10))
    for installed in ("flash_attn", "flash_attn_interface", "flag_gems"):
        monkeypatch.setitem(sys.modules, installed, None)
    assert adapter(name).why_not("cuda", dtype) == reason
    assert adapter(name).why_not("cpu", dtype) == "not for cpu tensors"
    found = peers.peers(ATTENTION, "cuda", dtype)
    assert (name in found) == (reason is None)
    assert peers.left_out(ATTENTION, "cuda", dtype).get(name) == reason
    assert peers.left_out(ATTENTION, "cpu", dtype) == {}


def test_why_a_peer_is_left_out_is_noted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = {"A": "needs sm_90", "B": "b is not installed"}
    monkeypatch.setattr(OpCase, "left_out", lambda self: reasons)
    _, effort = _measured(monkeypatch, ATTENTION.eager)
    assert effort.notes == ["attention float32: no A: needs sm_90"]
    _measured(monkeypatch, ATTENTION.eager, notes=effort.notes)
    assert len(effort.notes) == 1


def test_a_broken_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    module(monkeypatch, "flash_attn")  # of another release, without the function
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    reason = adapter("FlashAttention 2").why_not("cuda", HALF)
    assert reason is not None
    assert reason.startswith("flash-attn cannot be imported: cannot import name 'flash_attn_func'")


def test_packages_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"liger-kernel": "0.5.2", "flash-attn": "2.8.4"}
    monkeypatch.setattr(peers, "version", installed.get)
    found = peers.packages()
    assert found["liger-kernel"] == "0.5.2, has none of these ops"
    assert found["flash-attn"] == "2.8.4"
    assert found["apex"] == "not installed"
    assert set(found) == set(peers.PACKAGES)
