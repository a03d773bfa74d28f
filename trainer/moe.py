"""The sparse mixture of experts of the decoder (paper §3.2, eq. 2).

Shapes: N tokens, d model width, E experts, k chosen experts a token, f width of an expert.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Routing(NamedTuple):
    """Who computes which token: eq. 2's s (`probabilities`) and the non-zero g (`gates`)."""

    probabilities: Tensor  # [N, E] fp32, softmax over all experts
    gates: Tensor  # [N, k] fp32, not renormalised
    experts: Tensor  # [N, k] int64


class MoE(nn.Module):
    """`N_MoE` expert FFNs of which each token uses `K_MoE` (eq. 2, without the residual, which the block adds).

    The weights have the layout of ONNX Runtime's `com.microsoft::MoE`: `w1 [E, f, d]`, `w2 [E, d, f]`, `router [E, d]`.
    """

    def __init__(self, d_model: int, d_ff: int, experts: int, top_k: int) -> None:
        super().__init__()
        self.top_k = min(top_k, experts)
        self.router = nn.Parameter(torch.empty(experts, d_model))
        self.w1 = nn.Parameter(torch.empty(experts, d_ff, d_model))
        self.w2 = nn.Parameter(torch.empty(experts, d_model, d_ff))

    def route(self, x: Tensor) -> Routing:
        """Gates of `x [N, d]`: softmax over all experts, then the k largest as they are (eq. 2)."""
        probabilities = torch.softmax(F.linear(x, self.router).float(), dim=-1)
        gates, experts = torch.topk(probabilities, self.top_k, dim=-1)
        return Routing(probabilities, gates, experts)

    def forward(self, x: Tensor, routings: list[Routing] | None = None) -> Tensor:
        """Σ g_i FFN_i(x) of `x [..., d]`; appends how it routed to `routings` when given.

        Under `torch.onnx.export` this is one `com.microsoft::MoE` node, elsewhere a loop over the experts' tokens.
        """
        flat = x.reshape(-1, x.shape[-1])
        if torch.compiler.is_exporting():
            return self._symbolic(flat).reshape(x.shape)
        routing = self.route(flat)
        if routings is not None:
            routings.append(routing)
        return self._grouped(flat, routing).reshape(x.shape)

    def _symbolic(self, x: Tensor) -> Tensor:
        mixed = torch.onnx.ops.symbolic(
            "com.microsoft::MoE",
            (x, F.linear(x, self.router), self.w1, None, self.w2),
            {"activation_type": "relu", "k": self.top_k, "normalize_routing_weights": 0},
            dtype=x.dtype,
            shape=x.shape,
            version=1,
        )
        # The CPU kernel writes its output over an input that nobody reads afterwards, while it still reads it
        # (onnxruntime 1.31.1: silently wrong). A reader of `x` behind the node forbids that.
        return torch.where(torch.ones(1, dtype=torch.bool, device=x.device), mixed, x)

    def _grouped(self, x: Tensor, routing: Routing) -> Tensor:
        order = torch.argsort(routing.experts.flatten(), stable=True)
        counts = torch.bincount(routing.experts.flatten(), minlength=self.router.shape[0]).tolist()
        rows = x[order // self.top_k].split(counts)
        outputs = [
            F.linear(F.relu(F.linear(part, w1)), w2)
            for part, w1, w2 in zip(rows, self.w1.unbind(0), self.w2.unbind(0), strict=True)
        ]
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order))
        chosen = torch.cat(outputs)[back].view(*routing.gates.shape, -1)
        return (chosen * routing.gates.to(x.dtype).unsqueeze(-1)).sum(1)


def balance_loss(routing: Routing) -> Tensor:
    """E · Σ_e f_e · P_e, 1 at perfect balance: f the share of assignments, P the mean probability (Switch, eq. 4)."""
    experts = routing.probabilities.shape[-1]
    return experts * (load(routing) * routing.probabilities.mean(0)).sum()


def load(routing: Routing) -> Tensor:
    """Share of assignments that each expert got, `[E]` fp32, summing to 1."""
    counts = torch.bincount(routing.experts.flatten(), minlength=routing.probabilities.shape[-1])
    return counts.float() / max(1, routing.experts.numel())
