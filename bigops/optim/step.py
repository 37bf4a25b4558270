"""What the optimizers have in common: a step that is fused over all tensors of a group.

Everything but the step is torch's, so hooks, groups, schedulers, closures and state dicts are.
Nothing about tensors is remembered between steps: parameters, gradients and states may be replaced
or move at any time, and reading them anew costs half a microsecond a parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..backends import native
from ..ops.adam import grad_norm, grad_norm_of_groups
from ..ops.step import PLAIN
from ..ops.step_arguments import CODE_BLOCK
from ..reference import codes

STATE_DTYPES = {None: None, "bfloat16": torch.bfloat16, "int8": torch.uint8}
LOW = (torch.bfloat16, torch.float16)
OPTIONS = ("max_grad_norm", "state_dtype", "master_weights", "stochastic_rounding")
MASTER = "master_param"
CPU = torch.device("cpu")


@dataclass
class Work:
    """One call of the op.

    owners: the parameters, as the optimizer knows them; where they are DTensors (`sharded`) the
    lists hold this process' shards. started: their first states, which become
    the optimizer's when the step is done; empty if they have states. found: the native module's
    look at plain tensors, which is then what the lists are made of.
    """

    group: dict[str, Any]
    owners: list[Tensor]
    made: dict[str, Any] = field(default_factory=dict)
    started: list[dict[str, Tensor]] = field(default_factory=list)
    sharded: bool = False
    found: Any = None

    @property
    def lists(self) -> dict[str, Any]:
        """The op's, by argument."""
        if not self.made:
            self.made = _with_masters(self.found.lists())
        return self.made

    @property
    def device(self) -> torch.device:
        """Where the op's tensors are."""
        return CPU if self.found is not None and self.found.on_cpu else self.owners[0].device


class FusedStep(torch.optim.Optimizer):
    """Base of the optimizers: `_names`, `_start` and `_update` are theirs."""

    # GradScaler then leaves unscaling and skipping to the step (as with torch's fused=True). On
    # the class, since torch's __getstate__ drops what an instance has.
    _step_supports_amp_scaling = True
    max_grad_norm: float | None = None
    grad_norm: Tensor | None = None
    state_dtype: str | None = None
    master_weights: bool = False
    stochastic_rounding: bool = False
    # States by what torch calls them, and whether they have a sign.
    _signed: ClassVar[Mapping[str, bool]] = {}
    # Numbers that are options of a group, with what torch's messages call them.
    _numbers: ClassVar[Mapping[str, str]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{name: getattr(self, name) for name in OPTIONS}}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """torch's, after a check of the group's options."""
        if isinstance(param_group, dict):
            self._check_options(param_group)
        super().add_param_group(param_group)
        try:
            for param in self.param_groups[-1]["params"]:
                self._check_param(param)
        except ValueError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """torch's. States are taken whatever they were saved in, and kept in this optimizer's
        `state_dtype`; codes come back with the bits that they had."""
        super().load_state_dict(state_dict)
        coded = any(
            f"{key}_code" in s for s in state_dict["state"].values() for key in self._signed
        )
        if self.state_dtype is None and not self.master_weights and not coded:
            return
        saved = (number for group in state_dict["param_groups"] for number in group["params"])
        own = (param for group in self.param_groups for param in group["params"])
        for number, param in zip(saved, own, strict=True):
            if number in state_dict["state"]:
                self._take(param, state_dict["state"][number])

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
            norm = _total_norm(work)
            if not torch.compiler.is_compiling():  # Dynamo of torch 2.11 cannot set it
                self.grad_norm = norm
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        for one in work:
            device = one.device
            self._update(
                one,
                max_grad_norm=self.max_grad_norm,
                total_norm=_on(device, norm),
                grad_scale=_on(device, grad_scale),
                found_inf=_on(device, found_inf),
                rounding_seed=self._seed(device),
            )
            if one.started and not (found_inf is not None and found_inf.item()):
                for owner, state in zip(one.owners, one.started, strict=True):
                    self.state[owner].update(state)
        return loss

    def _seed(self, device: torch.device) -> Tensor | None:
        """Of torch's generator, so that torch.manual_seed repeats a run."""
        if not self.stochastic_rounding:
            return None
        return torch.randint(2**63 - 1, (), dtype=torch.int64, device=device)

    def _names(self, group: Mapping[str, Any]) -> dict[str, str]:
        """What the op calls each state, and torch's optimizer."""
        raise NotImplementedError

    def _own_names(self, group: Mapping[str, Any], masters: bool) -> dict[str, str]:
        """The same with what is beyond torch's: the states that are kept."""
        names = self._names(group)
        if self.state_dtype == "int8":
            coded = [(name, key) for name, key in names.items() if key in self._signed]
            names = names | {name: f"{key}_code" for name, key in coded}
            names |= {f"{name.removesuffix('s')}_scales": f"{key}_scale" for name, key in coded}
        return names | {"masters": MASTER} if masters else names

    def _kept(self, key: str, value: Tensor) -> dict[str, Tensor]:
        """A state as it is kept: in `state_dtype`."""
        if self.state_dtype == "int8":
            code, scale = codes.encode(value, self._signed[key])
            return {f"{key}_code": code, f"{key}_scale": scale}
        if self.state_dtype == "bfloat16":
            return {key: value.to(torch.bfloat16)}
        return {key: value}

    def _empty(self, key: str, like: Tensor) -> dict[str, Tensor]:
        """A state of zeros."""
        dtype = STATE_DTYPES[self.state_dtype] or like.dtype
        zeros = torch.zeros_like(like, dtype=dtype, memory_format=torch.preserve_format)
        if self.state_dtype != "int8":
            return {key: zeros}
        scale = torch.zeros(-(-like.numel() // CODE_BLOCK), device=like.device)
        return {f"{key}_code": zeros, f"{key}_scale": scale}

    def _take(self, param: Tensor, saved: Mapping[str, Any]) -> None:
        """A parameter's saved state."""
        state, has_master = self.state[param], self.master_weights and param.dtype in LOW
        for key, signed in self._signed.items():
            code, scale = saved.get(f"{key}_code"), saved.get(f"{key}_scale")
            for name in (key, f"{key}_code", f"{key}_scale"):
                state.pop(name, None)
            if code is None or scale is None:
                value = saved.get(key)
            elif self.state_dtype == "int8" and code.stride() == param.stride():
                state[f"{key}_code"] = code.to(param.device, copy=True)
                state[f"{key}_scale"] = scale.to(param.device, copy=True)
                continue
            else:
                value = codes.decode(code, scale, signed)
            if value is not None:
                wide = self.state_dtype is not None or has_master
                dtype = torch.float32 if wide else param.dtype
                state |= self._kept(key, torch.empty_like(param, dtype=dtype).copy_(value))
        state.pop(MASTER, None)
        if has_master:
            state[MASTER] = torch.empty_like(param, dtype=torch.float32).copy_(
                saved.get(MASTER, param)
            )

    def _check_param(self, param: Tensor) -> None:
        """That the options serve it."""
        if self.state_dtype == "int8" and hasattr(param, "to_local"):
            raise ValueError("state_dtype must not be 'int8' for DTensor parameters")
        if self.state_dtype is not None and param.dtype not in (torch.float32, *LOW):
            raise ValueError(
                f"state_dtype must be None for parameters of {param.dtype}, "
                f"got {self.state_dtype!r}"
            )

    def _start(
        self, param: Tensor, group: Mapping[str, Any], master: Tensor | None
    ) -> dict[str, Tensor]:
        """A parameter's first state, as torch's of the parameter or its master."""
        raise NotImplementedError

    # Whether the first step of a parameter differs from others and makes its state.
    _begins = False

    def _update(self, work: Work, **common: Any) -> None:
        """Call the op."""
        raise NotImplementedError

    def _collect(self, group: dict[str, Any]) -> Iterator[Work]:
        """The calls of a group's step."""
        for params, masters in self._parts(group["params"]):
            yield from self._collect_part(group, params, self._own_names(group, masters))

    def _parts(self, params: list[Tensor]) -> list[tuple[list[Tensor], bool]]:
        """The parameters, and whether they have masters."""
        if not self.master_weights:
            return [(params, False)]
        return [([p for p in params if (p.dtype in LOW) == low], low) for low in (True, False)]

    def _collect_part(
        self, group: dict[str, Any], params: list[Tensor], names: dict[str, str]
    ) -> Iterator[Work]:
        if native.kernels is not None and not torch.compiler.is_compiling():
            found = native.kernels.collect(params, self.state, names, tuple(PLAIN))
            if found is not None:
                if len(found):
                    yield Work(group, found.params, found=found)
                return
        params = [param for param in params if param.grad is not None]
        if any(param.grad is not None and param.grad.is_sparse for param in params):
            raise RuntimeError(
                f"{type(self).__name__} does not support sparse gradients, please consider "
                "SparseAdam instead"
            )
        started = {}
        for param in params:
            if names and not _complete(self.state.get(param), names):
                master = param.detach().float() if "masters" in names else None
                state = self._start(param, group, master)
                started[param] = state if master is None else {**state, MASTER: master}
        if not self._begins:
            for param, state in started.items():
                self.state[param].update(state)
            started = {}
        for begins in (False, True):
            owners = [param for param in params if (param in started) == begins]
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
        if options.get("state_dtype") not in STATE_DTYPES:
            raise ValueError(
                f"state_dtype must be None, 'bfloat16' or 'int8', got {options['state_dtype']!r}"
            )
        if options.get("master_weights") and options.get("stochastic_rounding"):
            raise ValueError("stochastic_rounding must be False with master_weights")
        if options.get("differentiable"):
            raise ValueError(
                "differentiable must be False: the fused step has no gradient; torch.optim has it"
            )


def is_number(value: Any) -> bool:
    """A number, or a tensor of one."""
    return isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1)


def _complete(state: Mapping[str, Any] | None, names: Mapping[str, str]) -> bool:
    if not state:
        return False
    return all(state.get(key) is not None for key in names.values())


def _work(
    group: dict[str, Any],
    names: Mapping[str, str],
    owners: list[Tensor],
    states: Sequence[Mapping[str, Tensor]],
    begins: bool,
) -> Work:
    lists: dict[str, Any] = {"params": owners, "grads": [param.grad for param in owners]}
    lists |= {name: [state[key] for state in states] for name, key in names.items()}
    sharded = any(hasattr(param, "to_local") for param in owners)
    if sharded:
        lists = {name: [_local(t) for t in tensors] for name, tensors in lists.items()}
    if any(param.is_complex() for param in owners):
        lists = {name: [_as_real(t) for t in tensors] for name, tensors in lists.items()}
    first = [dict(state) for state in states] if begins else []
    return Work(group, owners, _with_masters(lists), first, sharded)


def _with_masters(lists: dict[str, Any]) -> dict[str, Any]:
    """Masters are what the op updates, and the parameters then their rounded copies."""
    masters = lists.pop("masters", None)
    if masters is None:
        return lists
    return lists | {"params": masters, "low_precision_params": lists["params"]}


def _local(tensor: Tensor) -> Tensor:
    """A DTensor's own shard, which is its memory and no copy."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _as_real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _by_device(params: Sequence[Tensor]) -> list[list[Tensor]]:
    found: dict[torch.device, list[Tensor]] = {}
    for param in params:
        found.setdefault(param.device, []).append(param)
    return list(found.values())


def _on(device: torch.device, value: Tensor | None) -> Tensor | None:
    return value if value is None or value.device == device else value.to(device)


def _total_norm(work: Sequence[Work]) -> Tensor:
    """The norm of all gradients; one launch for each device, of shards torch's over all of them."""
    if any(one.sharded for one in work):
        found = [p.grad for one in work for p in one.owners if p.grad is not None]
        total = torch.nn.utils.get_total_norm(found)
        return total.full_tensor() if hasattr(total, "full_tensor") else total
    if all(one.found is not None for one in work):
        norm = grad_norm_of_groups([one.found for one in work])
        if norm is not None:
            return norm
    by_device: dict[torch.device, list[Tensor]] = {}
    for one in work:
        grads = one.lists["grads"]
        by_device.setdefault(grads[0].device, []).extend(grads)
    norms = [grad_norm(grads) for grads in by_device.values()]
    if len(norms) == 1:
        return norms[0]
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[0]) for norm in norms]))
