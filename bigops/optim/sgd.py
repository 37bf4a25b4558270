"""SGD: torch's optimizer with a fused step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..ops.sgd import sgd, sgd_group
from .step import FusedStep, Work


class SGD(FusedStep, torch.optim.SGD):
    """`torch.optim.SGD` with a fused step.

    Each step is one native call (on a GPU, one launch for each combination of dtypes) for each
    parameter group, however many tensors there are, and one more for the norm over all groups if
    `max_grad_norm` is set.

    Args:
        params: parameters, named parameters or groups of them: float32, bfloat16, float16,
            float64 or complex; momentum buffers have the parameter's dtype. Arithmetic is float32
            (float64 for float64).
        lr, momentum, dampening, weight_decay, nesterov, maximize: torch's, with torch's defaults.
        foreach, fused: they choose between torch's implementations; accepted.
        differentiable: must be False.
        max_grad_norm: clip the gradients' norm over all groups to this, exactly as
            `torch.nn.utils.clip_grad_norm_(all_params, max_grad_norm)` before the step would, but
            the gradients themselves are not modified. None: no clipping. No part of the state
            dict. The norm found is `self.grad_norm`.
        state_dtype: "bfloat16" keeps the momentum buffers in bfloat16, "int8" in codes of 8 bits
            with a scale for each 256 elements (Dettmers et al. 2022, "8-bit optimizers via
            block-wise quantization"; see `bigops.reference.codes`): a half and a quarter of
            float32's memory. In the state dict codes are `momentum_buffer_code` and
            `momentum_buffer_scale`, which torch's class does not read; one of ours without
            state_dtype does, and torch's state loads into ours. Not with float64 or complex
            parameters.
        master_weights: keep a float32 copy (`master_param` in the state) of each bfloat16 or
            float16 parameter, update that, and round it to the parameter in the same pass. Whoever
            changes such a parameter between steps changes its state too.
        stochastic_rounding: round bfloat16 parameters up or down in proportion (Gupta et al. 2015),
            so that small updates are not lost without masters. `torch.manual_seed` repeats a run.

    DTensor parameters (FSDP2's) are updated shard by shard, and their states are DTensors too
    (`state_dtype` not "int8").

    With torch.amp.GradScaler, unscaling and skipping happen inside the step; there too the
    gradients stay as they are. Sparse gradients, which torch's class takes without momentum, are
    refused.

    State dicts are torch's: they load into torch.optim.SGD and from it.

    Raises:
        ValueError: an option is negative, NaN or out of range; it names the option.

    Source: Sutskever et al. 2013, "On the importance of initialization and momentum in deep
    learning", with momentum in torch's form.

    Example:
        >>> optimizer = bigops.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> model(input).sum().backward()
        >>> optimizer.step()
    """

    _numbers: ClassVar = {
        "lr": "learning rate",
        "momentum": "momentum value",
        "weight_decay": "weight_decay value",
    }
    _signed: ClassVar = {"momentum_buffer": True}
    _begins = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
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
            momentum,
            dampening,
            weight_decay,
            nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
        )
        self.max_grad_norm = max_grad_norm

    def _names(self, group: Mapping[str, Any]) -> dict[str, str]:
        return {"momentum_buffers": "momentum_buffer"} if group["momentum"] != 0 else {}

    def _start(
        self, param: Tensor, group: Mapping[str, Any], master: Tensor | None
    ) -> dict[str, Tensor]:
        assert param.grad is not None
        if self.state_dtype is not None or master is not None:
            return self._empty("momentum_buffer", param if master is None else master)
        return {"momentum_buffer": torch.empty_like(param.grad)}  # lies as torch's, its clone

    def _update(self, work: Work, **common: Any) -> None:
        group = work.group
        numbers = common | {
            "lr": group["lr"],
            "momentum": group["momentum"],
            "dampening": group["dampening"],
            "weight_decay": group["weight_decay"],
            "nesterov": group["nesterov"],
            "maximize": group["maximize"],
            "is_first_step": bool(work.started),
        }
        if work.found is None or not sgd_group(work.found, **numbers):
            sgd(**{"momentum_buffers": [], **work.lists}, **numbers)

    def _check_options(self, options: Mapping[str, Any]) -> None:
        super()._check_options(options)
        if "dampening" in options and not isinstance(options["dampening"], int | float):
            raise ValueError(f"dampening must be a number, got {options['dampening']!r}")
