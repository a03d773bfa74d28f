"""Settings of model, trainer, catalogue and beam; no torch in here, so that the command line stays quick."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

Positive = Annotated[int, Meta(ge=1)]
Count = Annotated[int, Meta(ge=0)]


class CatalogueConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How items become semantic IDs; `codes` None means: chosen from the preset or the catalogue's size."""

    levels: Positive = 3
    codes: Positive | None = None
    dimension: Positive = 64
    method: Literal["greedy", "deferred", "plain"] = "deferred"
    iterations: Positive = 20
    seed: Count = 0
    text_model: str = "sentence-transformers/all-MiniLM-L6-v2"


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The architecture and nothing else (paper §3.2, 5.1.1)."""

    d_model: Positive = 128
    heads: Positive = 4
    encoder_layers: Positive = 2
    decoder_layers: Positive = 2
    d_ff: Positive = 256
    experts: Positive = 4
    top_k: Positive = 2
    levels: Positive = 3
    codes: Positive = 256
    history_length: Positive = 256
    session_items: Positive = 5
    history_tokens: Literal["code", "item"] = "item"
    relative_buckets: Positive = 32
    relative_max_distance: Positive = 128


class TrainConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The continuous trainer (paper 5.1.1).

    A checkpoint is written after `checkpoint_sessions`, or `checkpoint_seconds` where something was learnt since; neither
    decides any weight.
    `score_share`: share of the sessions that are scored before they are learnt, `score_beams` wide. `backlog_passes`:
    how often the sessions that ended before `backlog_until_ms` (None: all that the log holds at the start) are learnt
    before the trainer goes on with the rest, each once. `history_tokens` None: the preset's. `session_items`: items of a
    generated session, None for the state's `session.target_items`; 1 is next-item training. `micro_windows`: most windows
    at once on a rank, 0 all of its share: bounds the memory of a step. `shard_optimizer`: each rank keeps only its slice of
    Adam's moments. Both change rounding at most. `threads` are per rank.
    """

    preset: str = "tiny"
    history_tokens: Literal["code", "item"] | None = None
    session_items: Positive | None = None
    learning_rate: Annotated[float, Meta(gt=0)] = 2e-4
    batch_windows: Positive = 64
    clip_norm: Annotated[float, Meta(gt=0)] = 1.0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    checkpoint_sessions: Positive = 4096
    checkpoint_seconds: Annotated[float, Meta(gt=0)] = 300.0
    keep_checkpoints: Positive = 3
    idle_seconds: Annotated[float, Meta(gt=0)] = 1.0
    score_beams: Positive = 16
    score_share: Annotated[float, Meta(ge=0, le=1)] = 0.1
    backlog_passes: Positive = 1
    backlog_until_ms: Count | None = None
    micro_windows: Count = 0
    shard_optimizer: bool = False
    threads: Positive = 2
    seed: Count = 0


class RewardModelConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The reward model's architecture and nothing else (paper §3.3.1); `levels`, `codes`, `items` as the generator's.

    `buckets`: rows of each table of hashed code prefixes; `history_length`: how many of the newest items it looks at.
    """

    dimension: Positive = 64
    heads: Positive = 4
    layers: Positive = 1
    hidden: Positive = 64
    buckets: Positive = 16_384
    history_length: Positive = 64
    levels: Positive = 3
    codes: Positive = 256
    session_items: Positive = 5


class RewardConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the reward model is trained beside the generator, and how its four towers become one reward R(u, S) (eq. 6, 9).

    R is the weighted mean of the towers; a weight of 0 leaves a tower out. `train` false: a run without one.
    """

    train: bool = True
    learning_rate: Annotated[float, Meta(gt=0)] = 4e-3
    swt: Annotated[float, Meta(ge=0)] = 1.0
    vtr: Annotated[float, Meta(ge=0)] = 1.0
    wtr: Annotated[float, Meta(ge=0)] = 1.0
    ltr: Annotated[float, Meta(ge=0)] = 1.0


PreferenceLossName = Literal["dpo", "ipo", "cdpo", "rdpo", "cpo", "simpo", "s-dpo"]


class PreferenceConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Iterative preference alignment (paper §3.3.2, Algorithm 2).

    `ratio`: r_DPO, the share of sessions that become pairs, by a hash of the session id. `responses`: N. `weight`: λ.
    `beta`, `label_smoothing` (ε of cDPO and rDPO) and `gamma` (SimPO's margin over beta): None means the loss' own default;
    giving one to a loss that has no such term is refused. `rejected`: losers a pair (S-DPO takes several, all others 1).
    `min_margin`: pairs whose rewards differ by less are noise and dropped. `max_age`: a pair made by a snapshot that many
    versions behind the newest is still learnt, an older one is dropped. `pairs_per_step`: the most that one step learns.
    `seed_sessions`: sessions that the generator must have learnt before the first pair is used (the seed model).
    """

    ratio: Annotated[float, Meta(ge=0, le=1)] = 0.01
    responses: Annotated[int, Meta(ge=2)] = 128
    loss: PreferenceLossName = "dpo"
    weight: Annotated[float, Meta(ge=0)] = 1.0
    beta: Annotated[float, Meta(gt=0)] | None = None
    label_smoothing: Annotated[float, Meta(ge=0, lt=0.5)] | None = None
    gamma: Annotated[float, Meta(ge=0)] | None = None
    rejected: Positive = 1
    min_margin: Annotated[float, Meta(ge=0)] = 1e-3
    max_age: Positive = 4
    pairs_per_step: Positive = 8
    seed_sessions: Count = 0


class BeamConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The search that serves: `width` beams, of which a request may ask for as many sessions (paper §4: 128)."""

    width: Positive = 128
