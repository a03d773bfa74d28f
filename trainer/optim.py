"""Adam for a model that never stops learning: fp32 masters, bf16 arithmetic, and steps that a NaN cannot spoil."""

from __future__ import annotations

import copy
import ctypes
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from onerec.errors import UserError
from trainer.model import OneRec

Objective = Callable[[OneRec], tuple[Tensor, dict[str, Any]]]


def resolve_precision(precision: Literal["auto", "fp32", "bf16"], device: torch.device | str = "cpu") -> str:
    """`fp32` or `bf16`; `auto` is bf16 where the machine multiplies it natively (emulated it is slower)."""
    if precision != "auto":
        return precision
    if torch.device(device).type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    capabilities = torch.cpu.get_capabilities()
    return "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "fp32"


def _flatten(parameters: list[nn.Parameter]) -> Tensor:
    """One tensor that from now on is the memory of all `parameters`: one kernel call then updates or casts them all."""
    flat = torch.cat([parameter.detach().flatten() for parameter in parameters])
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.data = part.view_as(parameter)
    return flat


def reuse_memory() -> bool:
    """Let the C library keep freed blocks of any size for the next step; whether it could (glibc only).

    Else each step's large blocks are mapped anew, and a fifth to a third of its time goes into page faults. For the
    whole process and for good.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    trim_threshold, top_pad, mmap_max = -1, -2, -4
    settings = ((mmap_max, 0), (trim_threshold, 2**30), (top_pad, 2**26))
    return all(mallopt(option, value) == 1 for option, value in settings)


class Optimizer:
    """Adam (paper 5.1.1: 2e-4) on the fp32 parameters of `model`, which stay the weights to score, save and export.

    With bf16 a shadow of the model does forward and backward, and the masters keep what is too small for bf16. The
    gradient is clipped by its global norm; a step whose loss or gradient is not finite leaves weights and moments as
    they were and is counted in `skipped`. On the CPU with fixed threads the same steps give the same bytes, and a copy
    restored by `load_state_dict` goes on with the same bytes. On the CPU, the process keeps its memory (`reuse_memory`).
    """

    def __init__(
        self,
        model: OneRec,
        *,
        learning_rate: float = 2e-4,
        clip_norm: float = 1.0,
        precision: Literal["auto", "fp32", "bf16"] = "auto",
    ) -> None:
        parameters = list(model.parameters())
        if parameters[0].device.type == "cpu":
            reuse_memory()
        self.precision = resolve_precision(precision, parameters[0].device)
        self.clip_norm = clip_norm
        self.skipped = 0
        self._masters = _flatten(parameters)
        self.model = model
        self.compute = model
        if self.precision == "bf16":
            self.compute = copy.deepcopy(model).to(torch.bfloat16)
            self._shadow = _flatten(list(self.compute.parameters()))
        self._gradient = torch.zeros_like(self._masters)
        self._masters.grad = self._gradient
        sizes = [parameter.numel() for parameter in parameters]
        self._gradients = [
            part.view_as(parameter) for part, parameter in zip(self._gradient.split(sizes), parameters, strict=True)
        ]
        self._adam = torch.optim.Adam([self._masters], lr=learning_rate, fused=True)
        self._adam.state[self._masters] = {
            "step": torch.zeros((), dtype=torch.float32, device=self._masters.device),
            "exp_avg": torch.zeros_like(self._masters),
            "exp_avg_sq": torch.zeros_like(self._masters),
        }

    def step(self, objective: Objective) -> dict[str, Any]:
        """One update by the gradient of `objective(model)`, for example `lambda model: model.loss(batch)`.

        Returns the objective's stats with `loss` and `grad_norm` (before clipping), floats, and `skipped`, bool.
        """
        self.compute.train()
        with torch.enable_grad():
            loss, stats = objective(self.compute)
            gradients = torch.autograd.grad(loss, list(self.compute.parameters()), allow_unused=True)
        for into, gradient in zip(self._gradients, gradients, strict=True):
            if gradient is None:
                into.zero_()
            else:
                into.copy_(gradient)
        norm = float(torch.linalg.vector_norm(self._gradient))
        value = float(loss.detach())
        finite = math.isfinite(norm) and math.isfinite(value)
        if finite:
            if norm > self.clip_norm:
                self._gradient.mul_(self.clip_norm / norm)
            self._adam.step()
            self._cast()
        else:
            self.skipped += 1
        return {**stats, "loss": value, "grad_norm": norm, "skipped": not finite}

    def state_dict(self) -> dict[str, Tensor]:
        """Moments and counters as plain tensors; the moments are flat, in the order of `model.parameters()`."""
        state = self._adam.state[self._masters]
        return {
            "step": state["step"].clone(),
            "exp_avg": state["exp_avg"].clone(),
            "exp_avg_sq": state["exp_avg_sq"].clone(),
            "skipped": torch.tensor(self.skipped),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore `state_dict()`; the model's own weights must be loaded before (they are read anew here).

        Raises UserError when the state is of another architecture.
        """
        if state["exp_avg"].shape != self._masters.shape:
            raise UserError(
                f"optimizer state holds {state['exp_avg'].numel():,} values, the model {self._masters.numel():,}: "
                "they are of different architectures; resume with the preset that the run began with"
            )
        own = self._adam.state[self._masters]
        for name in ("step", "exp_avg", "exp_avg_sq"):
            own[name].copy_(state[name])
        self.skipped = int(state["skipped"])
        self._cast()

    @torch.no_grad()
    def _cast(self) -> None:
        """Bring the shadow up to the masters."""
        if self.precision == "bf16":
            self._shadow.copy_(self._masters)
