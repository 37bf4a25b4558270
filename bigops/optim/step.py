"""What the optimizers have in common: a step that is fused over all tensors of a group.

Everything but the step is torch's, so hooks, groups, schedulers, closures and state dicts are.
Nothing about tensors is remembered between steps: parameters, gradients and states may be replaced
or move at any time, and reading them anew costs a microsecond each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..backends import native
from ..ops.adam import grad_norm
from ..ops.step import PLAIN


@dataclass
class Work:
    """One call of the op: its lists by argument.

    owners: the parameters, as the optimizer knows them. started: their first states, which become
    the optimizer's when the step is done; empty if they have states.
    """

    group: dict[str, Any]
    owners: list[Tensor]
    lists: dict[str, Any]
    started: list[dict[str, Tensor]] = field(default_factory=list)


class FusedStep(torch.optim.Optimizer):
    """Base of the optimizers: `_names`, `_start` and `_update` are theirs."""

    # GradScaler then leaves unscaling and skipping to the step (as with torch's fused=True). On
    # the class, since torch's __getstate__ drops what an instance has.
    _step_supports_amp_scaling = True
    max_grad_norm: float | None = None
    grad_norm: Tensor | None = None
    # Numbers that are options of a group, with what torch's messages call them.
    _numbers: ClassVar[Mapping[str, str]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "max_grad_norm": self.max_grad_norm}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """torch's, after a check of the group's options."""
        if isinstance(param_group, dict):
            self._check_options(param_group)
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            The closure's loss, if there is one. `self.grad_norm` is then the gradients' norm
            before clipping, a tensor, if `max_grad_norm` is set (not under torch.compile).

        Raises:
            RuntimeError: a gradient is sparse. ValueError: a gradient does not fit its parameter.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # All groups are collected before the first is updated, so that an error leaves all as is.
        work = [one for group in self.param_groups for one in self._collect(group)]
        norm = None
        if self.max_grad_norm is not None and work:
            norm = _norm_over_devices([one.lists["grads"] for one in work])
            if not torch.compiler.is_compiling():  # Dynamo of torch 2.11 cannot set it
                self.grad_norm = norm
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        for one in work:
            device = one.lists["params"][0].device
            self._update(
                one,
                max_grad_norm=self.max_grad_norm,
                total_norm=_on(device, norm),
                grad_scale=_on(device, grad_scale),
                found_inf=_on(device, found_inf),
            )
            if one.started and not (found_inf is not None and found_inf.item()):
                for owner, state in zip(one.owners, one.started, strict=True):
                    self.state[owner].update(state)
        return loss

    def _names(self, group: Mapping[str, Any]) -> dict[str, str]:
        """What the op calls each state, and the optimizer."""
        raise NotImplementedError

    def _start(self, param: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        """A parameter's first state, as torch's."""
        raise NotImplementedError

    # Whether the first step of a parameter differs from others and makes its state.
    _begins = False

    def _update(self, work: Work, **common: Any) -> None:
        """Call the op."""
        raise NotImplementedError

    def _collect(self, group: dict[str, Any]) -> Iterator[Work]:
        """The calls of a group's step."""
        names = self._names(group)
        if native.kernels is not None and not torch.compiler.is_compiling():
            found = native.kernels.collect(group["params"], self.state, tuple(names.values()))
            if found is not None and set(map(type, found[0])) <= PLAIN:
                if found[0]:
                    lists = dict(zip(("params", "grads", *names), found, strict=True))
                    yield Work(group, found[0], lists)
                return
        params = [param for param in group["params"] if param.grad is not None]
        if any(param.grad.is_sparse for param in params):
            raise RuntimeError(
                f"{type(self).__name__} does not support sparse gradients, please consider "
                "SparseAdam instead"
            )
        new = [p for p in params if names and not _complete(self.state.get(p), names)]
        started = {param: self._start(param, group) for param in new}
        if not self._begins:
            for param, state in started.items():
                self.state[param].update(state)
            new = []
        fresh = set(new)
        for begins in (False, True):
            owners = [param for param in params if (param in fresh) == begins]
            for some in _by_device(owners):
                states = [started[param] if begins else self.state[param] for param in some]
                yield _work(group, names, some, states, begins)

    def _check_options(self, options: Mapping[str, Any]) -> None:
        """Those that are there; comparisons are such that NaN fails them."""
        for name, meaning in (*self._numbers.items(), ("max_grad_norm", "max_grad_norm value")):
            value: Any = options.get(name)
            if value is None and (name == "max_grad_norm" or name not in options):
                continue
            if isinstance(value, Tensor) and value.numel() != 1:
                raise ValueError(f"Tensor {name} must be 1-element, got shape {tuple(value.shape)}")
            if not is_number(value) or not value >= 0.0:
                raise ValueError(f"Invalid {meaning}: {value} ({name} must be 0 or positive)")
        if options.get("differentiable"):
            raise ValueError(
                "differentiable must be False: the fused step has no gradient; torch.optim has it"
            )


def is_number(value: Any) -> bool:
    """A number, or a tensor of one."""
    return isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1)


def _complete(state: Mapping[str, Any] | None, names: Mapping[str, str]) -> bool:
    return bool(state) and all(state.get(key) is not None for key in names.values())  # type: ignore[union-attr]


def _work(
    group: dict[str, Any],
    names: Mapping[str, str],
    owners: list[Tensor],
    states: Sequence[Mapping[str, Tensor]],
    begins: bool,
) -> Work:
    lists: dict[str, Any] = {"params": owners, "grads": [param.grad for param in owners]}
    lists |= {name: [state[key] for state in states] for name, key in names.items()}
    if any(param.is_complex() for param in owners):
        lists = {name: [_as_real(t) for t in tensors] for name, tensors in lists.items()}
    return Work(group, owners, lists, [dict(state) for state in states] if begins else [])


def _as_real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _by_device(params: Sequence[Tensor]) -> list[list[Tensor]]:
    found: dict[torch.device, list[Tensor]] = {}
    for param in params:
        found.setdefault(param.device, []).append(param)
    return list(found.values())


def _on(device: torch.device, value: Tensor | None) -> Tensor | None:
    return value if value is None or value.device == device else value.to(device)


def _norm_over_devices(lists: Sequence[list[Tensor]]) -> Tensor:
    """The norm of all gradients; one launch for each device."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for grads in lists:
        by_device.setdefault(grads[0].device, []).extend(grads)
    norms = [grad_norm(grads) for grads in by_device.values()]
    if len(norms) == 1:
        return norms[0]
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[0]) for norm in norms]))
