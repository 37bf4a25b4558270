"""Adam and AdamW: torch's optimizers with a fused step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..ops.adam import adam, adam_group
from .step import FusedStep, Work, is_number

STATES = {
    "exp_avgs": "exp_avg",
    "exp_avg_sqs": "exp_avg_sq",
    "max_exp_avg_sqs": "max_exp_avg_sq",
    "state_steps": "step",
}
PLAIN_STATES = {name: key for name, key in STATES.items() if key != "max_exp_avg_sq"}


class _FusedAdam(FusedStep, torch.optim.Adam):
    _numbers: ClassVar = {
        "lr": "learning rate",
        "eps": "epsilon value",
        "weight_decay": "weight_decay value",
    }

    _signed: ClassVar = {"exp_avg": True, "exp_avg_sq": False, "max_exp_avg_sq": False}

    def _names(self, group: Mapping[str, Any]) -> dict[str, str]:
        return STATES if group["amsgrad"] else PLAIN_STATES

    def _start(
        self, param: Tensor, group: Mapping[str, Any], master: Tensor | None
    ) -> dict[str, Tensor]:
        wide = torch.get_default_dtype() == torch.float64 and not group["fused"]
        step = torch.zeros(
            (),
            dtype=torch.float64 if wide else torch.float32,
            device=param.device if group["capturable"] or group["fused"] else "cpu",
        )
        state, like = {"step": step}, param if master is None else master
        for key in self._names(group).values():
            state |= self._empty(key, like) if key != "step" else {}
        return state

    def _update(self, work: Work, **common: Any) -> None:
        group = work.group
        beta1, beta2 = group["betas"]
        numbers = common | {
            "amsgrad": group["amsgrad"],
            "beta1": float(beta1),
            "beta2": float(beta2),
            "lr": group["lr"],
            "weight_decay": group["weight_decay"],
            "eps": group["eps"],
            "maximize": group["maximize"],
            "decoupled_weight_decay": group["decoupled_weight_decay"],
        }
        if work.found is None or not adam_group(work.found, **numbers):
            adam(**{"max_exp_avg_sqs": [], **work.lists}, **numbers)

    def _check_options(self, options: Mapping[str, Any]) -> None:
        super()._check_options(options)
        if options.get("amsgrad") and options.get("state_dtype", self.state_dtype) == "int8":
            raise ValueError("state_dtype must not be 'int8' with amsgrad")
        if "betas" in options:
            betas = options["betas"]
            if not isinstance(betas, tuple | list) or len(betas) != 2:
                raise ValueError(f"betas must be two numbers, got {betas!r}")
            for i, beta in enumerate(betas):
                if not is_number(beta) or not 0.0 <= beta < 1.0:
                    raise ValueError(
                        f"Invalid beta parameter at index {i}: {beta} (betas must be in [0, 1))"
                    )


class Adam(_FusedAdam):
    """`torch.optim.Adam` with a fused step.

    Each step is one native call (on a GPU, one launch for each combination of dtypes) for each
    parameter group, however many tensors there are, and one more for the norm over all groups if
    `max_grad_norm` is set.

    Args:
        params: parameters, named parameters or groups of them: float32, bfloat16, float16,
            float64 or complex; states have the parameter's dtype. Arithmetic is float32 (float64
            for float64).
        lr, betas, eps, weight_decay, amsgrad, maximize, decoupled_weight_decay: torch's, with
            torch's defaults.
        foreach, fused, capturable: they choose between torch's implementations; accepted. With
            fused or capturable steps are counted on the parameters' device, where the kernels also
            read a tensor `lr` that is there: a CUDA graph may then hold the step.
        differentiable: must be False.
        max_grad_norm: clip the gradients' norm over all groups to this, exactly as
            `torch.nn.utils.clip_grad_norm_(all_params, max_grad_norm)` before the step would, but
            the gradients themselves are not modified. None: no clipping. No part of the state
            dict. The norm found is `self.grad_norm`.
        state_dtype: "bfloat16" keeps the averages in bfloat16, "int8" in codes of 8 bits
            with a scale for each 256 elements (Dettmers et al. 2022, "8-bit optimizers via
            block-wise quantization"; see `bigops.reference.codes`): a half and a quarter of
            float32's memory. In the state dict codes are `exp_avg_code` and
            `exp_avg_scale`, which torch's class does not read; one of ours without
            state_dtype does, and torch's state loads into ours. Not with float64 or complex
            parameters, "int8" not with amsgrad.
        master_weights: keep a float32 copy (`master_param` in the state) of each bfloat16 or
            float16 parameter, update that, and round it to the parameter in the same pass. Whoever
            changes such a parameter between steps changes its state too.
        stochastic_rounding: round bfloat16 parameters up or down in proportion (Gupta et al. 2015),
            so that small updates are not lost without masters. `torch.manual_seed` repeats a run.

    DTensor parameters (FSDP2's) are updated shard by shard, and their states are DTensors too
    (`state_dtype` not "int8").

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
        state_dtype: str | None = None,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
    ) -> None:
        self._check_options(locals())
        self.state_dtype, self.master_weights = state_dtype, master_weights
        self.stochastic_rounding = stochastic_rounding
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


class AdamW(_FusedAdam, torch.optim.AdamW):
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
        state_dtype: str | None = None,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
    ) -> None:
        self._check_options(locals())
        self.state_dtype, self.master_weights = state_dtype, master_weights
        self.stochastic_rounding = stochastic_rounding
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
