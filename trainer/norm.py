"""T5's layer norm: no mean, no bias."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

EPSILON = 1e-6


class RMSNorm(nn.Module):
    """`x / rms(x) · weight` over the last axis, the rms in fp32 or better."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """`[..., d]` -> `[..., d]`."""
        if torch.compiler.is_exporting():
            # Square root and division, not rsqrt: the pattern that ONNX Runtime fuses into one node.
            return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + EPSILON) * self.weight
        return _RMSNorm.apply(x, self.weight)


class _RMSNorm(torch.autograd.Function):
    """`F.rms_norm` is unfused on the CPU and keeps fp32 copies; this keeps x and one number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        scale = torch.rsqrt(norm.square() / x.shape[-1] + EPSILON).to(x.dtype)
        normed = x * scale
        ctx.save_for_backward(normed, scale, weight)
        return normed * weight

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        normed, scale, weight = ctx.saved_tensors
        gradient = gradients[0]
        product = gradient * normed
        d_weight = product.flatten(0, -2).sum(0)
        along = torch.matmul(product, weight.unsqueeze(-1)) / -weight.shape[0]
        d_x = torch.addcmul(gradient * weight, normed, along).mul_(scale)
        return d_x, d_weight
