"""Adam and AdamW: torch's optimizers, the step fused over all tensors of a group.

Everything but the step is inherited, so hooks, groups, schedulers, closures and state dicts are
torch's. Nothing about tensors is remembered between steps: parameters, gradients and states may
be replaced or move at any time, and reading them anew costs a microsecond each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..backends import native
from ..ops.adam import adam, grad_norm

STATES = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


class _FusedStep(torch.optim.Adam):
    # GradScaler then leaves unscaling and skipping to the step (as with torch's fused=True). On
    # the class, since torch's __getstate__ drops what an instance has.
    _step_supports_amp_scaling = True
    max_grad_norm: float | None = None
    grad_norm: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "max_grad_norm": self.max_grad_norm}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """torch's, after a check of the group's options."""
        if isinstance(param_group, dict):
            _check_options(param_group)
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
        work = [(group, lists) for group in self.param_groups for lists in self._collect(group)]
        norm = None
        if self.max_grad_norm is not None and work:
            norm = _norm_over_devices([lists[1] for _, lists in work])
            if not torch.compiler.is_compiling():  # Dynamo of torch 2.11 cannot set it
                self.grad_norm = norm
        for group, lists in work:
            device = lists[0][0].device
            beta1, beta2 = group["betas"]
            adam(
                *lists,
                amsgrad=group["amsgrad"],
                beta1=float(beta1),
                beta2=float(beta2),
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=group["maximize"],
                decoupled_weight_decay=group["decoupled_weight_decay"],
                max_grad_norm=self.max_grad_norm,
                total_norm=_on(device, norm),
                grad_scale=_on(device, getattr(self, "grad_scale", None)),
                found_inf=_on(device, getattr(self, "found_inf", None)),
            )
        return loss

    def _collect(self, group: dict[str, Any]) -> list[list[list[Tensor]]]:
        """The lists that `adam` takes, for each device."""
        names = STATES if group["amsgrad"] else STATES[:2]
        if native.kernels is not None and not torch.compiler.is_compiling():
            found = native.kernels.adam_collect(group["params"], self.state, (*names, "step"))
            if found is not None:
                found[-1:-1] = [[]] * (len(STATES) - len(names))
                return [found] if found[0] else []
        params = [param for param in group["params"] if param.grad is not None]
        grads = [param.grad for param in params]
        if any(grad.is_sparse for grad in grads):
            raise RuntimeError(
                "Adam does not support sparse gradients, please consider SparseAdam instead"
            )
        states = [self.state[param] for param in params]
        if not all(states):
            for param, state in zip(params, states, strict=True):
                if not state:
                    _start(param, group, state)
        averages = [[state[name] for state in states] for name in names]
        averages += [[]] * (len(STATES) - len(names))
        lists = [params, grads, *averages, [state["step"] for state in states]]
        if any(dtype.is_complex for dtype in {param.dtype for param in params}):
            lists = [[_as_real(t) for t in tensors] for tensors in lists]
        devices = {param.device for param in params}
        if len(devices) <= 1:
            return [lists] if params else []
        return [_those_on(device, lists) for device in devices]


def _as_real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _those_on(device: torch.device, lists: list[list[Tensor]]) -> list[list[Tensor]]:
    which = [i for i, param in enumerate(lists[0]) if param.device == device]
    return [[tensors[i] for i in which] if tensors else [] for tensors in lists]


def _start(param: Tensor, group: Mapping[str, Any], state: dict[str, Tensor]) -> None:
    """A parameter's first state, as torch's."""
    wide = torch.get_default_dtype() == torch.float64 and not group["fused"]
    state["step"] = torch.zeros(
        (),
        dtype=torch.float64 if wide else torch.float32,
        device=param.device if group["capturable"] or group["fused"] else "cpu",
    )
    for name in STATES if group["amsgrad"] else STATES[:2]:
        state[name] = torch.zeros_like(param, memory_format=torch.preserve_format)


def _on(device: torch.device, value: Tensor | None) -> Tensor | None:
    return value if value is None or value.device == device else value.to(device)


def _norm_over_devices(lists: list[list[Tensor]]) -> Tensor:
    """The norm of all gradients; one launch for each device."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for grads in lists:
        by_device.setdefault(grads[0].device, []).extend(grads)
    norms = [grad_norm(grads) for grads in by_device.values()]
    if len(norms) == 1:
        return norms[0]
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[0]) for norm in norms]))


def _check_options(options: Mapping[str, Any]) -> None:
    """The options that are there; comparisons are such that NaN fails them."""
    for name, meaning in (
        ("lr", "learning rate"),
        ("eps", "epsilon value"),
        ("weight_decay", "weight_decay value"),
        ("max_grad_norm", "max_grad_norm value"),
    ):
        value: Any = options.get(name)
        if value is None and (name == "max_grad_norm" or name not in options):
            continue
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(f"Tensor {name} must be 1-element, got shape {tuple(value.shape)}")
        if not _is_number(value) or not value >= 0.0:
            raise ValueError(f"Invalid {meaning}: {value} ({name} must be 0 or positive)")
    if "betas" in options:
        betas = options["betas"]
        if not isinstance(betas, tuple | list) or len(betas) != 2:
            raise ValueError(f"betas must be two numbers, got {betas!r}")
        for i, beta in enumerate(betas):
            if not _is_number(beta) or not 0.0 <= beta < 1.0:
                raise ValueError(
                    f"Invalid beta parameter at index {i}: {beta} (betas must be in [0, 1))"
                )
    if options.get("differentiable"):
        raise ValueError(
            "differentiable must be False: the fused step has no gradient; torch.optim has it"
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1)


class Adam(_FusedStep):
    """`torch.optim.Adam` with a fused step.

    Each step is one native call (on a GPU, one launch per dtype) for each parameter group, however
    many tensors there are, and one more for the norm over all groups if `max_grad_norm` is set.

    Args:
        params: parameters, named parameters or groups of them: float32, bfloat16, float16,
            float64 or complex; states have the parameter's dtype. Arithmetic is float32 (float64
            for float64).
        lr, betas, eps, weight_decay, amsgrad, maximize, decoupled_weight_decay: torch's, with
            torch's defaults.
        foreach, fused, capturable: they choose between torch's implementations; accepted.
        differentiable: must be False.
        max_grad_norm: clip the gradients' norm over all groups to this, exactly as
            `torch.nn.utils.clip_grad_norm_(all_params, max_grad_norm)` before the step would, but
            the gradients themselves are not modified. None: no clipping. No part of the state
            dict. The norm found is `self.grad_norm`.

    With torch.amp.GradScaler, unscaling and skipping happen inside the step; there too the
    gradients stay as they are.

    State dicts are torch's: they load into torch.optim.Adam and from it.

    Raises:
        ValueError: an option is negative, NaN or out of range; it names the option.

    Source: Kingma and Ba 2015, "Adam: a method for stochastic optimization" (arXiv:1412.6980).

    Example:
        >>> optimizer = bigops.optim.Adam(model.parameters(), lr=1e-3, max_grad_norm=1.0)
        >>> model(input).sum().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        max_grad_norm: float | None = None,
    ) -> None:
        _check_options(locals())
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=decoupled_weight_decay,
        )
        self.max_grad_norm = max_grad_norm


class AdamW(_FusedStep, torch.optim.AdamW):
    """`torch.optim.AdamW` with a fused step.

    As `Adam`, with a weight decay (0.01 by default) that shrinks the parameters directly and
    leaves the averages alone.

    Source: Loshchilov and Hutter 2019, "Decoupled weight decay regularization" (arXiv:1711.05101).

    Example:
        >>> optimizer = bigops.optim.AdamW(model.parameters(), lr=3e-4, max_grad_norm=1.0)
        >>> model(input).sum().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        max_grad_norm: float | None = None,
    ) -> None:
        _check_options(locals())
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )
        self.max_grad_norm = max_grad_norm
