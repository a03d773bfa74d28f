"""The sparse mixture of experts of the decoder (paper §3.2, eq. 2).

Shapes: N tokens, d model width, E experts, k chosen experts a token, f width of an expert.
"""

from __future__ import annotations

from typing import Any, NamedTuple

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
        logits = F.linear(x, self.router)
        probabilities = torch.softmax(logits.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)
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
        return _Experts.apply(flat, routing.gates, routing.experts, self.w1, self.w2).view(x.shape)

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


class _Experts(torch.autograd.Function):
    """Σ_k gate · w2[e] relu(w1[e] x) over tokens sorted by expert: each expert is two matrix products.

    Left to autograd, each `w1[e]` of the loop gets a gradient tensor of all experts. Gathers only, no atomic adds, so
    that the same input gives the same bytes.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gates: Tensor, experts: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        top_k = experts.shape[1]
        order = torch.argsort(experts.flatten(), stable=True)
        counts = torch.bincount(experts.flatten(), minlength=w1.shape[0]).tolist()
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        token = order // top_k
        rows = x[token]
        hidden = rows.new_empty(len(rows), w1.shape[1])
        answers = torch.empty_like(rows)
        for expert, (part, inner, answer) in enumerate(
            zip(rows.split(counts), hidden.split(counts), answers.split(counts), strict=True)
        ):
            torch.mm(part, w1[expert].t(), out=inner)
            torch.mm(inner.relu_(), w2[expert].t(), out=answer)
        ctx.save_for_backward(rows, hidden, answers, gates, order, back, w1, w2)
        ctx.counts = counts
        return _sum_chosen(answers[back].view(-1, top_k, x.shape[1]) * gates.to(x.dtype).unsqueeze(-1))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, hidden, answers, gates, order, back, w1, w2 = ctx.saved_tensors
        counts, top_k = ctx.counts, gates.shape[1]
        d_out = gradients[0][order // top_k]
        d_gates = (d_out * answers).sum(-1, dtype=gates.dtype)[back].view(gates.shape)
        d_answers = d_out * gates.flatten()[order].to(d_out.dtype).unsqueeze(-1)
        d_w1, d_w2, d_rows = torch.empty_like(w1), torch.empty_like(w2), torch.empty_like(rows)
        parts = (tensor.split(counts) for tensor in (rows, hidden, d_answers, d_rows))
        for expert, (part, inner, d_answer, d_part) in enumerate(zip(*parts, strict=True)):
            torch.mm(d_answer.t(), inner, out=d_w2[expert])
            d_inner = torch.ops.aten.threshold_backward(d_answer @ w2[expert], inner, 0)
            torch.mm(d_inner.t(), part, out=d_w1[expert])
            torch.mm(d_inner, w1[expert], out=d_part)
        d_x = _sum_chosen(d_rows[back].view(-1, top_k, rows.shape[1]))
        return d_x, d_gates, None, d_w1, d_w2


def _sum_chosen(parts: Tensor) -> Tensor:
    """Sum of `parts [N, k, d]` over k; of two, an addition, which is ten times faster than `sum`."""
    return parts[:, 0] + parts[:, 1] if parts.shape[1] == 2 else parts.sum(1)


def of_tokens(routing: Routing, real: Tensor) -> Routing:
    """The routing of the tokens where `real` (bool `[N]`) is True; padding must not count as load."""
    return Routing(*(part[real] for part in routing))


def assignments(routing: Routing) -> Tensor:
    """How many tokens chose each expert, int64 `[E]`; a token counts for each of its k experts."""
    return torch.bincount(routing.experts.flatten(), minlength=routing.probabilities.shape[-1])


def load(routing: Routing) -> Tensor:
    """Share of assignments that each expert got, `[E]` fp32, summing to 1."""
    return assignments(routing).float() / max(1, routing.experts.numel())


def balance_loss(routing: Routing, whole: Tensor | None = None) -> Tensor:
    """E · Σ_e f_e · P_e, 1 at perfect balance: f the share of assignments, P the mean probability.

    The auxiliary loss of Switch Transformers (arXiv 2101.03961, eq. 4). It changes how the router learns and leaves
    eq. 2 itself as it is; a selection bias (DeepSeek-V3) would have to be carried into the exported graph's top-k.

    `whole`: the `assignments` of a larger batch of which this is a part; f and P are then means over that, and the losses
    of its parts add up to its loss.
    """
    whole = assignments(routing) if whole is None else whole
    total = whole.sum().clamp(min=1)
    mean = routing.probabilities.sum(0) * (routing.experts.shape[1] / total)
    return len(whole) * (whole / total * mean).sum()
