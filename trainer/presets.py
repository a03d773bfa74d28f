"""The table of model sizes, and how many parameters each has; no torch in here, so that the command line stays quick.

|        | d   | layers | experts | f     | K     | total | active |
|--------|-----|--------|---------|-------|-------|-------|--------|
| tiny   | 128 | 2 + 2  | 4       | 256   | 256   | 1.2M  | 0.9M   |
| small  | 256 | 4 + 4  | 8       | 1,024 | 1,024 | 24M   | 10M    |
| 0.1B   | 256 | 6 + 6  | 24      | 1,024 | 8,192 | 96M   | 21M    |
| 1B     | 512 | 4 + 10 | 24      | 4,096 | 8,192 | 1.07B | 139M   |

Experts 24, top 2 and K = 8,192 of the last two are the paper's (5.1.1); it does not give widths and depths. Those of
`1B` put 94 % of the weights into experts, which is what brings the active share to the paper's 13 % (§4).
"""

from __future__ import annotations

from typing import Any

import msgspec

from onerec.errors import UserError
from trainer.config import ModelConfig

PRESETS: dict[str, ModelConfig] = {
    "tiny": ModelConfig(d_model=128, heads=4, encoder_layers=2, decoder_layers=2, d_ff=256, experts=4, codes=256),
    "small": ModelConfig(d_model=256, heads=4, encoder_layers=4, decoder_layers=4, d_ff=1024, experts=8, codes=1024),
    "0.1B": ModelConfig(d_model=256, heads=4, encoder_layers=6, decoder_layers=6, d_ff=1024, experts=24, codes=8192),
    "1B": ModelConfig(d_model=512, heads=8, encoder_layers=4, decoder_layers=10, d_ff=4096, experts=24, codes=8192),
}


def preset(
    name: str,
    *,
    levels: int | None = None,
    codes: int | None = None,
    session_items: int | None = None,
    history_length: int | None = None,
    history_tokens: str | None = None,
) -> ModelConfig:
    """The preset's architecture for a catalogue (`levels`, `codes`) and a task (the rest); None keeps the preset's.

    Raises UserError for an unknown name, listing the known ones, and for an impossible value.
    """
    if name not in PRESETS:
        raise UserError(f"unknown preset {name!r}: choose one of {', '.join(PRESETS)}")
    given: dict[str, Any] = {
        "levels": levels,
        "codes": codes,
        "session_items": session_items,
        "history_length": history_length,
        "history_tokens": history_tokens,
    }
    chosen = msgspec.structs.asdict(PRESETS[name]) | {key: value for key, value in given.items() if value is not None}
    try:
        return msgspec.convert(chosen, ModelConfig)
    except msgspec.ValidationError as error:
        raise UserError(f"preset {name!r}: {error}") from None


def total_parameters(config: ModelConfig) -> int:
    """Every weight of `OneRec(config)`."""
    return _outside_experts(config) + _input_tables(config) + config.experts * _experts(config)


def active_parameters(config: ModelConfig) -> int:
    """The weights that one history position and one decoder position are multiplied with.

    Of each layer's experts the chosen ones; without the input tables, of which a position reads one row.
    """
    return _outside_experts(config) + min(config.top_k, config.experts) * _experts(config)


def _input_tables(config: ModelConfig) -> int:
    return (config.levels * config.codes + 2) * config.d_model


def _experts(config: ModelConfig) -> int:
    """One expert of every decoder layer."""
    return config.decoder_layers * 2 * config.d_model * config.d_ff


def _outside_experts(config: ModelConfig) -> int:
    d = config.d_model
    attention = 4 * d * d
    encoder_layer = attention + 2 * d * config.d_ff + 2 * d
    decoder_layer = 2 * attention + config.experts * d + 3 * d
    heads = config.levels * config.codes * d
    biases = 2 * config.relative_buckets * config.heads
    return config.encoder_layers * encoder_layer + config.decoder_layers * decoder_layer + heads + biases + 2 * d
