"""Adam for a model that never stops learning: fp32 masters, bf16 arithmetic, and steps that a NaN cannot spoil."""

from __future__ import annotations

import copy
import ctypes
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from onerec.errors import UserError
from trainer.model import OneRec
from trainer.ranks import Ranks, added, plain, tensors

Objective = Callable[[OneRec], tuple[Tensor, dict[str, Any]]]
Parts = Callable[[OneRec], Iterable[tuple[Tensor, dict[str, Any]]]]
"""Losses and stats that add up to a step's; each is computed after the gradient of the one before was taken."""


def resolve_precision(precision: Literal["auto", "fp32", "bf16"], device: torch.device | str = "cpu") -> str:
    """`fp32` or `bf16`; `auto` is bf16 where the machine multiplies it natively (emulated it is slower)."""
    if precision != "auto":
        return precision
    if torch.device(device).type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    capabilities = torch.cpu.get_capabilities()
    return "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "fp32"


def _flatten(parameters: list[nn.Parameter], multiple: int = 1) -> Tensor:
    """One tensor that from now on is the memory of all `parameters`: one kernel call then updates or casts them all.

    Zeros behind them bring its length to a multiple of `multiple`.
    """
    padding = parameters[0].new_zeros(-sum(p.numel() for p in parameters) % multiple)
    flat = torch.cat([*(parameter.detach().flatten() for parameter in parameters), padding])
    for parameter, part in zip(parameters, _views(flat, parameters), strict=True):
        parameter.data = part
    return flat


def _views(flat: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    """The parts of `flat`, shaped as the `parameters`."""
    sizes = [parameter.numel() for parameter in parameters]
    parts = flat[: sum(sizes)].split(sizes)
    return [part.view_as(parameter) for part, parameter in zip(parts, parameters, strict=True)]


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

    With several `ranks` the gradient is the sum over all of them and all weights stay the same on each. With `shard` a
    rank keeps only its slice of Adam's moments, updates that slice of the weights and gets the others' (ZeRO, stage 1:
    arXiv 1910.02054); whole weights remain, since every step scores with them and every publish takes them. All ranks
    must call `step`, `step_parts`, `state_dict` and `load_state_dict` together.
    """

    def __init__(
        self,
        model: OneRec,
        *,
        learning_rate: float = 2e-4,
        clip_norm: float = 1.0,
        precision: Literal["auto", "fp32", "bf16"] = "auto",
        ranks: Ranks | None = None,
        shard: bool = False,
    ) -> None:
        parameters = list(model.parameters())
        if parameters[0].device.type == "cpu":
            reuse_memory()
        self.precision = resolve_precision(precision, parameters[0].device)
        self.clip_norm = clip_norm
        self.skipped = 0
        self._ranks = ranks or Ranks()
        self._shard = shard and self._ranks.size > 1
        slices = self._ranks.size if self._shard else 1
        self._count = sum(parameter.numel() for parameter in parameters)
        self._masters = self._ranks.same(_flatten(parameters, slices))
        self.model = model
        self.compute = model
        if self.precision == "bf16":
            self.compute = copy.deepcopy(model).to(torch.bfloat16)
            self._shadow = _flatten(list(self.compute.parameters()), slices)
        self._gradient = torch.zeros_like(self._masters)
        self._gradients = _views(self._gradient, parameters)
        # What this rank updates: all of it, or its slice.
        self._own = self._masters.chunk(slices)[self._ranks.rank if self._shard else 0]
        self._own.grad = torch.zeros_like(self._own) if self._shard else self._gradient
        self._adam = torch.optim.Adam([self._own], lr=learning_rate, fused=True)
        self._adam.state[self._own] = {
            "step": torch.zeros((), dtype=torch.float32, device=self._masters.device),
            "exp_avg": torch.zeros_like(self._own),
            "exp_avg_sq": torch.zeros_like(self._own),
        }

    def step(self, objective: Objective) -> dict[str, Any]:
        """One update by the gradient of `objective(model)`, for example `lambda model: model.loss(batch)`.

        Returns the objective's stats with `loss` and `grad_norm` (before clipping), floats, and `skipped`, bool.
        """
        return self.step_parts(lambda model: [objective(model)])

    def step_parts(self, parts: Parts) -> dict[str, Any]:
        """`step` of a loss that comes in addends, as of micro-batches: only one's activations are held at a time.

        A rank may have none. Their stats are added up, over all ranks too.
        """
        self.compute.train()
        seen: list[dict[str, Any]] = []
        value = 0.0
        with torch.enable_grad():
            for loss, stats in parts(self.compute):
                self._take_gradient(loss, first=not seen)
                seen.append(stats)
                value += float(loss.detach())
        if not seen:
            self._gradient.zero_()
        total = seen[0] if len(seen) == 1 else added(seen)
        if self._ranks.size > 1:
            gathered = self._ranks.collect(plain({**total, "loss": value}), dict[str, Any])
            total = added([tensors(stats) for stats in gathered])
            value = total["loss"]
        norm = self._sum_gradient()
        finite = math.isfinite(norm) and math.isfinite(value)
        if finite:
            if norm > self.clip_norm:
                assert self._own.grad is not None  # noqa: S101
                self._own.grad.mul_(self.clip_norm / norm)
            self._adam.step()
            if self._shard:
                self._ranks.join_slices(self._masters)
            self._cast()
        else:
            self.skipped += 1
        return {**total, "loss": value, "grad_norm": norm, "skipped": not finite}

    def _take_gradient(self, loss: Tensor, *, first: bool) -> None:
        gradients = torch.autograd.grad(loss, list(self.compute.parameters()), allow_unused=True)
        for into, gradient in zip(self._gradients, gradients, strict=True):
            if gradient is not None:
                _ = into.copy_(gradient) if first else into.add_(gradient)
            elif first:
                into.zero_()

    def _sum_gradient(self) -> float:
        """Bring the sum over all ranks to where Adam takes it; its norm."""
        if not self._shard:
            return float(torch.linalg.vector_norm(self._ranks.sum_(self._gradient)))
        assert self._own.grad is not None  # noqa: S101
        own = self._ranks.sum_slices(self._gradient, self._own.grad)
        return float(self._ranks.sum_(torch.linalg.vector_norm(own).square())) ** 0.5

    def state_dict(self) -> dict[str, Tensor]:
        """Moments and counters as plain tensors; the moments are flat, in the order of `model.parameters()`.

        The same with and without `shard`, so that another number of ranks can go on from it; with it only rank 0's is
        whole.
        """
        state = self._adam.state[self._own]
        return {
            "step": state["step"].clone(),
            "exp_avg": self._whole(state["exp_avg"]),
            "exp_avg_sq": self._whole(state["exp_avg_sq"]),
            "skipped": torch.tensor(self.skipped),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore `state_dict()`; the model's own weights must be loaded before (they are read anew here).

        Raises UserError when the state is of another architecture.
        """
        if state["exp_avg"].numel() != self._count:
            raise UserError(
                f"optimizer state holds {state['exp_avg'].numel():,} values, the model {self._count:,}: "
                "they are of different architectures; resume with the preset that the run began with"
            )
        own = self._adam.state[self._own]
        own["step"].copy_(state["step"])
        begin = self._own.numel() * self._ranks.rank if self._shard else 0
        for name in ("exp_avg", "exp_avg_sq"):
            part = state[name][begin : begin + self._own.numel()]
            own[name].zero_()[: len(part)].copy_(part)
        self.skipped = int(state["skipped"])
        self._cast()

    def _whole(self, own: Tensor) -> Tensor:
        """A copy of a moment over all parameters; where ranks hold slices, on rank 0 only, the others give theirs."""
        return self._ranks.gather_slices(own.cpu())[: self._count] if self._shard else own[: self._count].clone()

    @torch.no_grad()
    def _cast(self) -> None:
        """Bring the shadow up to the masters."""
        if self.precision == "bf16":
            self._shadow.copy_(self._masters)
