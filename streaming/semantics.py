"""The configuration values that decide what the stream computes (SEMANTICS.md §10)."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

Count = Annotated[int, Meta(ge=0)]
Positive = Annotated[int, Meta(ge=1)]


class WatchConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What counts as having watched (§4)."""

    effective_ms: Positive = 7_000


class HistoryConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How much of a user is remembered (§4); `length` is the paper's n = 256 (5.1.1)."""

    length: Positive = 256


class SessionConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where sessions begin and end, which are of high quality, and their labels (§5-7)."""

    by: Literal["gap", "request"] = "gap"
    gap_ms: Count = 1_800_000
    max_ms: Count = 86_400_000
    max_items: Positive = 500
    feedback_delay_ms: Count | None = None
    min_watched: Count = 5
    min_total_watch_ms: Count = 60_000
    min_interactions: Count = 1
    swt_cap_ms: Positive = 300_000
    target_items: Positive = 5

    @property
    def feedback_ms(self) -> int:
        """The feedback delay in force: default and upper limit are the gap (§5)."""
        delay = self.gap_ms if self.feedback_delay_ms is None else self.feedback_delay_ms
        return min(delay, self.gap_ms)


class StreamConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Time, identity and the bound on open state (§1-3)."""

    max_out_of_orderness_ms: Count = 300_000
    max_future_ms: Count = 60_000
    dedup_horizon_ms: Count = 3_600_000
    max_open_events: Positive = 10_000

    @property
    def future_ms(self) -> int:
        """How far ahead of its log record an event may be: never more than the out-of-orderness (§1)."""
        return min(self.max_future_ms, self.max_out_of_orderness_ms)


class Semantics(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All values that change the numbers; a state directory remembers them and refuses others."""

    watch: WatchConfig = WatchConfig()
    history: HistoryConfig = HistoryConfig()
    session: SessionConfig = SessionConfig()
    stream: StreamConfig = StreamConfig()
