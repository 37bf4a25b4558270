"""A torch op made of Python functions: schema, fake, gradient, and the road of a call to it.

The gradient is a torch.autograd.Function on the op's own Autograd key, so that a direct call of
`torch.ops.bigops.<op>` has it too. `torch.library.register_autograd` would do the same but for
torch.func.grad, which it does not serve; what our way needs from torch is private and therefore
probed, with register_autograd as the public fallback.

A call whose tensors nobody watches (no mode, no transform, no subclass, no profiler) skips the
dispatcher: through two Python kernels that takes longer than a small op itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

try:
    from torch._C import _are_functorch_transforms_active as _functorch_active
    from torch._C import _AutoDispatchBelowAutograd as _below_autograd
    from torch._C import _get_tracing_state as _tracing_state
    from torch._C import _is_any_autocast_enabled as _autocast_enabled
    from torch._C import _len_torch_dispatch_stack as _dispatch_modes
    from torch._C import _len_torch_function_stack as _function_modes
    from torch._functorch.utils import enable_single_level_autograd_function
    from torch.autograd import _profiler_enabled, forward_ad
    from torch.autograd.function import _SingleLevelFunction

    _PROBED = hasattr(forward_ad, "_current_level")
except ImportError:
    _PROBED = False

library = torch.library.Library("bigops", "FRAGMENT")
PLAIN = (torch.Tensor, torch.nn.Parameter)


def watched() -> bool:
    """Whether anything but eager autograd has to see every call that is made now."""
    return (
        not _PROBED
        or torch.compiler.is_compiling()
        or _dispatch_modes() > 0
        or _function_modes() > 0
        or _functorch_active()
        or forward_ad._current_level >= 0
        or _profiler_enabled()
        or _tracing_state() is not None
    )


def casting() -> bool:
    """Whether torch.autocast may change the dtypes of a call."""
    return not _PROBED or _autocast_enabled()


def _watched(args: tuple[Any, ...]) -> bool:
    """The same, or one of the arguments is a tensor of another kind."""
    return watched() or any(isinstance(a, torch.Tensor) and type(a) not in PLAIN for a in args)


def _recorded(args: tuple[Any, ...]) -> bool:
    """Whether autograd needs a node for the call."""
    if not torch.is_grad_enabled():
        return False
    return any(isinstance(a, torch.Tensor) and a.requires_grad for a in args)


class TorchOp:
    """`torch.ops.bigops.<name>`, called like it.

    run: the op on real tensors of any device. fake: its outputs without data.
    setup_context, backward: as of torch.autograd.Function.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        run: Callable[..., Any],
        fake: Callable[..., Any],
        setup_context: Callable[..., None],
        backward: Callable[..., Any],
    ) -> None:
        library.define(f"{name}{schema}", tags=[torch.Tag.pt2_compliant_tag])
        for key in ("CPU", "CUDA"):
            library.impl(name, run, key)
        torch.library.register_fake(f"bigops::{name}", fake, lib=library)
        self.overload = getattr(torch.ops.bigops, name).default
        self._run = run
        if not _PROBED:
            torch.library.register_autograd(
                f"bigops::{name}", backward, setup_context=setup_context, lib=library
            )
            return
        self._record = recording(name, self._below_autograd, setup_context, backward)
        library.impl(name, self._autograd_kernel, "Autograd")

    def __call__(self, *args: Any) -> Any:
        if _watched(args):
            return self.overload(*args)
        return self._record(*args) if _recorded(args) else self._run(*args)

    def _below_autograd(self, *args: Any) -> Any:
        if not _watched(args):
            return self._run(*args)
        with _below_autograd():
            return self.overload(*args)

    def _autograd_kernel(self, *args: Any) -> Any:
        # Forward-mode differentiation needs the node too: it raises, as we have no jvp.
        if not _recorded(args) and forward_ad._current_level < 0:
            return self._below_autograd(*args)
        if not _functorch_active():
            return self._record(*args)
        with enable_single_level_autograd_function():
            return self._record(*args)


def recording(
    name: str,
    forward: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
) -> Callable[..., Any]:
    """`forward`, leaving a node in autograd's graph."""

    # Both in one call: torch's own call of a setup_context takes microseconds.
    def forward_and_context(ctx: Any, *args: Any) -> Any:
        output = forward(*args)
        setup_context(ctx, args, output)
        return output

    # Function without functorch's turn: the dispatcher has given that when an Autograd kernel runs.
    function: Any = type(
        f"{name}_autograd",
        (_SingleLevelFunction,),
        {"forward": staticmethod(forward_and_context), "backward": staticmethod(backward)},
    )
    return function.apply


def save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """The setup_context of `no_second_gradient`."""


def no_gradient(name: str) -> Callable[..., Any]:
    """The backward of an op that has none."""

    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(f"bigops.{name} has no gradient: call it under torch.no_grad()")

    return backward


def no_second_gradient(name: str) -> Callable[..., Any]:
    """A backward that says what to do instead."""

    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            f"bigops.{name}: the fast backends have no second gradient; "
            'run it under bigops.use_backend("reference")'
        )

    return backward
