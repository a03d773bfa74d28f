"""One configuration: defaults, a TOML file, then `--set section.key=value`, checked against types (SEMANTICS.md §10)."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import msgspec

from onerec.errors import UserError
from onerec.monitor.settings import FreshnessConfig, GateConfig, MetricsConfig, MonitorConfig, PublishConfig
from streaming.kafka.settings import KafkaConfig
from streaming.semantics import HistoryConfig, Positive, Semantics, SessionConfig, StreamConfig, WatchConfig
from trainer.config import BeamConfig, CatalogueConfig, PreferenceConfig, RewardConfig, TrainConfig


class ServeConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How Triton batches and answers."""

    max_batch: int = 8
    queue_delay_us: int = 2_000
    max_queue_size: int = 1_024
    threads: int = 2


class StreamSettings(StreamConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The stream's section: the semantic values, and how long `ingest` waits for a source that has nothing to read."""

    idle_ms: Positive = 5_000


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Every section of the TOML file."""

    watch: WatchConfig = WatchConfig()
    history: HistoryConfig = HistoryConfig()
    session: SessionConfig = SessionConfig()
    stream: StreamSettings = StreamSettings()
    kafka: KafkaConfig = KafkaConfig()
    catalogue: CatalogueConfig = CatalogueConfig()
    train: TrainConfig = TrainConfig()
    reward: RewardConfig = RewardConfig()
    preference: PreferenceConfig = PreferenceConfig()
    beam: BeamConfig = BeamConfig()
    serve: ServeConfig = ServeConfig()
    metrics: MetricsConfig = MetricsConfig()
    freshness: FreshnessConfig = FreshnessConfig()
    monitor: MonitorConfig = MonitorConfig()
    publish: PublishConfig = PublishConfig()
    gate: GateConfig = GateConfig()

    @property
    def semantics(self) -> Semantics:
        """The sections that decide what the stream computes."""
        names = StreamConfig.__struct_fields__
        stream = StreamConfig(**{name: getattr(self.stream, name) for name in names})
        return Semantics(watch=self.watch, history=self.history, session=self.session, stream=stream)


def _parse_value(text: str) -> Any:
    """A value of `--set` as TOML reads it, else the bare text."""
    try:
        return tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        return text


def explicit_settings(path: Path | None = None, settings: list[str] | None = None) -> dict[str, dict[str, Any]]:
    """What the user said, file then `--set`, as nested tables; not yet checked.

    Raises UserError for an unreadable file or a `--set` that is not `section.key=value`.
    """
    table: dict[str, dict[str, Any]] = {}
    if path is not None:
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"configuration {path}: {error.strerror}; give --config an existing TOML file") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"configuration {path} is not TOML: {error}") from None
    for setting in settings or []:
        name, equals, value = setting.partition("=")
        section, dot, key = name.strip().partition(".")
        if not (equals and dot and section and key):
            raise UserError(f"--set {setting!r}: write it as section.key=value, for example session.gap_ms=1800000")
        if not isinstance(table.setdefault(section, {}), dict):
            raise UserError(f"configuration {path}: `{section}` is a value where a [{section}] table is expected")
        table[section][key] = _parse_value(value.strip())
    return table


def load_config(
    path: Path | None = None, settings: list[str] | None = None, bootstrap: str | None = None
) -> Config:
    """The configuration in force; `bootstrap`, where given, wins over `kafka.bootstrap`.

    Raises UserError naming the key and the remedy for an unknown key, a wrong type or an impossible value.
    """
    table = explicit_settings(path, settings)
    if bootstrap is not None:
        kafka = table.setdefault("kafka", {})
        if isinstance(kafka, dict):
            kafka["bootstrap"] = bootstrap
    try:
        return msgspec.convert(table, Config)
    except msgspec.ValidationError as error:
        message, _, place = str(error).partition(" - at ")
        place = place.strip("`").removeprefix("$").lstrip(".") or "the top level"
        known = ", ".join(f"{f.name}.*" for f in msgspec.structs.fields(Config))
        section = place.split(".")[0]
        for field in msgspec.structs.fields(Config):
            if field.name == section:
                known = ", ".join(f"{section}.{f.name}" for f in msgspec.structs.fields(type(field.default)))
        raise UserError(f"configuration: {message} at {place}; known here: {known}") from None
