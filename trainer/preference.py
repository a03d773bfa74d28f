"""Preference losses on sessions, one interface: DPO, IPO, cDPO, rDPO, CPO, SimPO, S-DPO (paper §3.3.2, eq. 10; Table 1).

Shapes: P pairs, R losers a pair, T history items, m items of a session, L levels. Log-probabilities are those of whole
sessions, log M(S | H_u): sums over their m·L codes. In formulas w and l are winner and loser, π the policy M_{t+1}, ref
the reference M_t, and h = log π(w)/ref(w) - log π(l)/ref(l).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from onerec.errors import UserError
from trainer.config import PreferenceConfig
from trainer.model import OneRec


class PreferenceBatch(NamedTuple):
    """Winners and losers as M_t made them; every session has all its m items."""

    history: Tensor  # int64 [P, T, L], right-padded, oldest first
    history_mask: Tensor  # bool [P, T]
    chosen: Tensor  # int64 [P, m, L]
    rejected: Tensor  # int64 [P, R, m, L]
    chosen_reference: Tensor  # fp32 [P], log-probability under M_t
    rejected_reference: Tensor  # fp32 [P, R]


class LogProbs(NamedTuple):
    """Log-probabilities of P pairs, and how many codes each session has."""

    chosen: Tensor  # [P]
    rejected: Tensor  # [P, R]
    chosen_reference: Tensor  # [P]
    rejected_reference: Tensor  # [P, R]
    codes: int  # m·L

    @property
    def chosen_logratios(self) -> Tensor:
        """log π(w) / ref(w), `[P]`."""
        return self.chosen - self.chosen_reference

    @property
    def rejected_logratios(self) -> Tensor:
        """log π(l) / ref(l), `[P, R]`."""
        return self.rejected - self.rejected_reference

    @property
    def delta(self) -> Tensor:
        """h of the first loser, `[P]`."""
        return self.chosen_logratios - self.rejected_logratios[:, 0]


class Terms(NamedTuple):
    """The constants of a loss; None where it has no such term."""

    beta: float
    label_smoothing: float | None = None
    gamma: float | None = None


def dpo(p: LogProbs, beta: float) -> Tensor:
    """-log σ(β h): DPO, arXiv 2305.18290 eq. 7; the OneRec paper's eq. 10. log 2 where policy and reference agree."""
    return -F.logsigmoid(beta * p.delta)


def ipo(p: LogProbs, beta: float) -> Tensor:
    """(h - 1 / (2 β))²: IPO, arXiv 2310.12036 eq. 17, whose τ is β. Zero at h = 1 / (2 β), whatever the reward."""
    return (p.delta - 1 / (2 * beta)) ** 2


def cdpo(p: LogProbs, beta: float, smoothing: float) -> Tensor:
    """-(1 - ε) log σ(β h) - ε log σ(-β h): cDPO, E. Mitchell's note of 2023 (ericmitchell.ai/cdpo.pdf).

    ε is the chance that a label is wrong. Its minimum is at σ(β h) = 1 - ε.
    """
    return -(1 - smoothing) * F.logsigmoid(beta * p.delta) - smoothing * F.logsigmoid(-beta * p.delta)


def rdpo(p: LogProbs, beta: float, smoothing: float) -> Tensor:
    """(-(1 - ε) log σ(β h) + ε log σ(-β h)) / (1 - 2 ε): robust DPO, arXiv 2403.00409, its unbiased estimate.

    Its mean over labels flipped with chance ε is DPO's loss on the true ones; of a single pair it may be negative.
    """
    loss = -(1 - smoothing) * F.logsigmoid(beta * p.delta) + smoothing * F.logsigmoid(-beta * p.delta)
    return loss / (1 - 2 * smoothing)


def cpo(p: LogProbs, beta: float) -> Tensor:
    """-log σ(β (log π(w) - log π(l))) - log π(w) / (m·L): CPO, arXiv 2401.08417, L_prefer + L_NLL; no reference.

    The paper writes L_NLL = -log π(w); its authors' code takes the mean over tokens, and so does this: at β = 0.1 the
    sum would outweigh the preference by ten to one.
    """
    return -F.logsigmoid(beta * (p.chosen - p.rejected[:, 0])) - p.chosen / p.codes


def simpo(p: LogProbs, beta: float, gamma: float) -> Tensor:
    """-log σ(β (log π(w) - log π(l)) / (m·L) - γ): SimPO, arXiv 2405.14734 eq. 6; no reference.

    `gamma` is the ratio γ / β, as in the authors' code: the margin in mean log-probability of a code.
    """
    return -F.logsigmoid(beta * ((p.chosen - p.rejected[:, 0]) / p.codes - gamma))


def s_dpo(p: LogProbs, beta: float) -> Tensor:
    """-log σ(-log Σ_l exp(β log π(l)/ref(l) - β log π(w)/ref(w))): S-DPO, arXiv 2406.09215; DPO where R = 1."""
    return -F.logsigmoid(-torch.logsumexp(beta * (p.rejected_logratios - p.chosen_logratios.unsqueeze(1)), dim=1))


LOSSES: dict[str, tuple[Callable[..., Tensor], Terms]] = {
    "dpo": (dpo, Terms(beta=0.1)),
    "ipo": (ipo, Terms(beta=1.0)),
    "cdpo": (cdpo, Terms(beta=0.1, label_smoothing=0.1)),
    "rdpo": (rdpo, Terms(beta=0.1, label_smoothing=0.1)),
    "cpo": (cpo, Terms(beta=0.1)),
    "simpo": (simpo, Terms(beta=2.0, gamma=0.25)),
    "s-dpo": (s_dpo, Terms(beta=0.1)),
}
"""Each loss and its own constants, from where its authors start.

IPO has the largest τ of its paper: a session's h sums m·L codes, and at 0.1 the gradient, 2 (h - 5), is 200 times DPO's.
"""

REFERENCE_FREE = frozenset({"cpo", "simpo"})


def check(config: PreferenceConfig) -> None:
    """Refuse options that the loss would not read: UserError naming both and the remedy."""
    if config.loss not in LOSSES:
        raise UserError(f"preference.loss={config.loss} is unknown; give one of {', '.join(LOSSES)}")
    own = LOSSES[config.loss][1]
    for name in ("label_smoothing", "gamma"):
        if getattr(config, name) is not None and getattr(own, name) is None:
            takers = " or ".join(loss for loss, (_, terms) in LOSSES.items() if getattr(terms, name) is not None)
            raise UserError(
                f"preference.{name}={getattr(config, name)} means nothing to preference.loss={config.loss}; "
                f"leave preference.{name} out, or set preference.loss to {takers}"
            )
    if config.rejected > 1 and config.loss != "s-dpo":
        raise UserError(
            f"preference.rejected={config.rejected}, but preference.loss={config.loss} compares with one loser; "
            "leave preference.rejected out, or set preference.loss to s-dpo"
        )
    if config.rejected >= config.responses:
        raise UserError(
            f"preference.rejected={config.rejected} losers and a winner do not fit into "
            f"preference.responses={config.responses}; generate more responses"
        )


def terms(config: PreferenceConfig) -> Terms:
    """The constants of the configured loss: what is given, else its own."""
    own = LOSSES[config.loss][1]
    given = {name: getattr(config, name) for name in Terms._fields if getattr(config, name) is not None}
    return own._replace(**given)


def preference_loss(
    config: PreferenceConfig,
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    codes: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of each pair `[P]`, from log-probabilities of winners `[P]` and losers `[P, R]`; `codes` is m·L.

    Stats, detached, `[P]`: `chosen_logratios` and `rejected_logratios` (mean of the losers) to the reference, `margin`,
    their difference in nats, and `accuracy`, 1 where the margin is above 0. They mean the same for every loss, also for
    those that read no reference. Raises ValueError for several losers where the loss compares with one.
    """
    if policy_rejected.shape[1] != 1 and config.loss != "s-dpo":
        raise ValueError(f"{config.loss} compares with one loser, not {policy_rejected.shape[1]}")
    pairs = LogProbs(policy_chosen, policy_rejected, reference_chosen, reference_rejected, codes)
    function = LOSSES[config.loss][0]
    losses = function(pairs, *(value for value in terms(config) if value is not None))
    chosen, rejected = pairs.chosen_logratios.detach(), pairs.rejected_logratios.detach().mean(1)
    margin = chosen - rejected
    stats = {
        "chosen_logratios": chosen,
        "rejected_logratios": rejected,
        "margin": margin,
        "accuracy": (margin > 0).to(margin.dtype),
    }
    return losses, stats


def loss(model: OneRec, batch: PreferenceBatch, config: PreferenceConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean loss over the pairs of `batch`, a scalar, and `preference_loss`' stats as means over the pairs.

    The encoder runs once a pair; winner and losers share its keys and values.
    """
    sessions = torch.cat((batch.chosen.unsqueeze(1), batch.rejected), dim=1)
    log_probs = model.code_log_probs(batch.history, batch.history_mask, sessions).sum((-1, -2))
    losses, stats = preference_loss(
        config,
        log_probs[:, 0],
        log_probs[:, 1:],
        batch.chosen_reference,
        batch.rejected_reference,
        codes=batch.chosen[0].numel(),
    )
    return losses.mean(), {name: values.mean() for name, values in stats.items()}
