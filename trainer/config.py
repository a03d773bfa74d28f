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
    before the trainer goes on with the rest, each once. `history_tokens` None: the preset's.
    """

    preset: str = "tiny"
    history_tokens: Literal["code", "item"] | None = None
    learning_rate: Annotated[float, Meta(gt=0)] = 2e-4
    batch_windows: Positive = 64
    clip_norm: Annotated[float, Meta(gt=0)] = 1.0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    checkpoint_sessions: Positive = 4096
    checkpoint_seconds: Annotated[float, Meta(gt=0)] = 300.0
    keep_checkpoints: Positive = 3
    idle_seconds: Annotated[float, Meta(gt=0)] = 2.0
    score_beams: Positive = 16
    score_share: Annotated[float, Meta(ge=0, le=1)] = 0.1
    backlog_passes: Positive = 1
    backlog_until_ms: Count | None = None
    threads: Positive = 2
    seed: Count = 0


class BeamConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The search that serves: `width` beams, of which a request may ask for as many sessions (paper §4: 128)."""

    width: Positive = 128
