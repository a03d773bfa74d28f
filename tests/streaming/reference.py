"""SEMANTICS.md once more, by brute force: every event is kept, everything is computed again from the reports.

It shares nothing with the stream core but the configuration structs, so that two readings of the text meet in the
tests. Where the text leaves a choice, the reading taken here is:

- §1 "a line longer than 1 MiB": the bytes without the line feed, a carriage return included; blank lines are skipped
  whatever their length.
- §1 "nested deeper than 128": the event's own object is level 1; a line with 129 open brackets is `too_deep`, even
  where it is no JSON for another reason.
- §1 "RFC 8259": the escape of a lone surrogate is JSON. In an ignored field it does no harm; an identifier that holds
  one has no UTF-8, so it is refused by the code of its field; a `type` that holds one is `bad_type`.
- §1 "JSON integers": `-0` is the integer 0; `true`, `1.0` and `1e3` are none.
- §1 one reason a line, in the order type, user_id, item_id, a ts that is no integer, event_id, request_id, watch_ms,
  duration_ms, the range of ts, tags and author_id, embedding. An `item` has no user_id, event_id or request_id;
  whatever stands there is ignored. Its tags are absent, null or a list of strings, its author_id absent, null or a
  string.
- §1 "all finite": as 32-bit floats, the catalogue's.
- §1 "the catalogue's dimension": that of the first valid embedding, where none is given.
- §1 "+ max_future_ms (at most max_out_of_orderness)": the smaller of the two.
- §2 "the largest ts of its reports that were not late (of the first, if it was late)": where the first report was
  late, its ts alone counts, also after later reports that were not.
- §2 "treated as new": also counted as late if it is, and the one that later repeats merge into.
- §2 "events in open sessions": watches that are not late and stand in no written session, and interactions that are
  not late, belong to no written session and may still come to belong to one: their ts is not below the watermark, or
  a session that is not written starts at or before them. A new event that is not late is refused when there are
  *more than* `max_open_events`; repeats and late events are not.
- §3 "a line that is no valid event is taken at once": by §1 alone; with several such, in the order of the sources. An
  `item`, kept apart from all below §1, has no time here either and is taken at once, too.
- §5 written sessions take no more part: sessions are cut from the watches that stand in none, and interactions choose
  among the sessions not written at that moment, as they stand then.
- §5 "final": looked at after every valid event, whether it moved the watermark or not (in request mode a repeat that
  brings a request_id may take an old watch into a session of its own).
- §5 "the one with its own request_id": with several of those, the one that starts first.
- §5 a session has a request_id in request mode only; null in gap mode.
- §5 after a flush, interactions that belong to no session may still come to belong to a later one.
- §6 `swt` and `vtr` are floats, 1.0 when capped.
- §7 a window that starts at the session's first item has the session's history; all others H(ts of their first item).
- §8 seeds are no events: they move no watermark and make no user known to `histories`.
"""

from __future__ import annotations

import csv
import gzip
import heapq
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import orjson

from streaming.semantics import Semantics

POSITIVE_INTERACTIONS = {"like", "follow", "share", "collect", "comment"}
INTERACTIONS = POSITIVE_INTERACTIONS | {"dislike"}
EARLIEST_TS = 631_152_000_000
LONGEST_MS = 604_800_000
LONGEST_LINE = 1024 * 1024
DEEPEST = 128
LARGEST_FLOAT = (2 - 2**-23) * 2.0**127


class InvalidLine(Exception):
    """A line that §1 refuses; its text is the reason code."""


@dataclass
class Fields:
    """A valid line: the fields that the rules speak of."""

    type: str
    user_id: str
    item_id: str
    event_id: str | None
    request_id: str | None
    ts: int
    watch_ms: int = 0
    duration_ms: int = 0
    embedding: list[float] | None = None


def is_blank(raw: bytes) -> bool:
    return not raw.strip(b" \t\r")


def parse_line(raw: bytes, now_ms: int, semantics: Semantics) -> Fields:
    """§1 for one line that is not blank."""
    if len(raw) > LONGEST_LINE:
        raise InvalidLine("too_long")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise InvalidLine("not_json") from None
    if depth(text) > DEEPEST:
        raise InvalidLine("too_deep")
    try:
        value = json.loads(text, parse_int=parse_int, parse_constant=refuse_constant)
    except ValueError:
        raise InvalidLine("not_json") from None
    if not isinstance(value, dict):
        raise InvalidLine("not_json")

    type_ = value.get("type")
    if not isinstance(type_, str) or type_ not in INTERACTIONS | {"watch", "item"}:
        raise InvalidLine("bad_type")
    if type_ != "item" and not is_identifier(value.get("user_id")):
        raise InvalidLine("bad_user_id")
    if not is_identifier(value.get("item_id")):
        raise InvalidLine("bad_item_id")
    ts = value.get("ts")
    if type(ts) is not int:
        raise InvalidLine("bad_ts")
    if type_ != "item":
        for name in ("event_id", "request_id"):
            if value.get(name) is not None and not is_identifier(value[name]):
                raise InvalidLine("bad_" + name)
    if type_ == "watch":
        for name in ("watch_ms", "duration_ms"):
            if type(value.get(name)) is not int or not 0 <= value[name] <= LONGEST_MS:
                raise InvalidLine("bad_" + name)
    if ts < EARLIEST_TS:
        raise InvalidLine("bad_ts")
    if ts > now_ms + min(semantics.stream.max_future_ms, semantics.stream.max_out_of_orderness_ms):
        raise InvalidLine("future_ts")
    if type_ == "item":
        check_item(value)
        return Fields(type_, "", value["item_id"], None, None, ts, embedding=parse_embedding(value.get("embedding")))
    fields = Fields(type_, value["user_id"], value["item_id"], value.get("event_id"), value.get("request_id"), ts)
    if type_ == "watch":
        fields.watch_ms, fields.duration_ms = value["watch_ms"], value["duration_ms"]
    return fields


def check_item(value: dict[str, object]) -> None:
    tags, author_id = value.get("tags"), value.get("author_id")
    if tags is not None and not (isinstance(tags, list) and all(isinstance(tag, str) for tag in tags)):
        raise InvalidLine("bad_item")
    if author_id is not None and not isinstance(author_id, str):
        raise InvalidLine("bad_item")


def parse_int(digits: str) -> int:
    # Python refuses to convert thousands of digits; any number out of all ranges will do instead.
    return int(digits) if len(digits) < 60 else int(digits[:60])


def refuse_constant(name: str) -> None:
    raise ValueError(name)


def parse_embedding(value: object) -> list[float] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not value:
        raise InvalidLine("bad_embedding")
    for number in value:
        if type(number) not in (int, float) or not abs(number) <= LARGEST_FLOAT:
            raise InvalidLine("bad_embedding")
    return [float(number) for number in value]


def is_identifier(value: object) -> bool:
    if not isinstance(value, str):
        return False
    try:
        return 1 <= len(value.encode("utf-8")) <= 256
    except UnicodeEncodeError:
        return False


def depth(text: str) -> int:
    """The largest number of brackets that are open at once, outside of strings."""
    if text.count("[") + text.count("{") <= DEEPEST:
        return 0
    level = deepest = 0
    in_string = escaped = False
    for character in text:
        if in_string:
            if escaped:
                escaped = False
            elif character == "\\":
                escaped = True
            elif character == '"':
                in_string = False
        elif character == '"':
            in_string = True
        elif character in "[{":
            level += 1
            deepest = max(deepest, level)
        elif character in "]}":
            level -= 1
    return deepest


def split_lines(data: bytes) -> list[bytes]:
    """The lines of a file, its byte-order mark and blank lines left out (§1)."""
    return [line for line in data.removeprefix(b"\xef\xbb\xbf").split(b"\n") if not is_blank(line)]


def merge(sources: Sequence[Sequence[bytes]], now_ms: int, semantics: Semantics) -> Iterator[bytes]:
    """Several sources as one (§3)."""
    rest = [list(lines) for lines in sources]
    while any(rest):
        best: tuple[int, int] | None = None
        for number, lines in enumerate(rest):
            while lines:
                try:
                    fields = parse_line(lines[0], now_ms, semantics)
                except InvalidLine:
                    fields = None
                if fields is None or fields.type == "item":
                    yield lines.pop(0)
                    continue
                if best is None or fields.ts < best[0]:
                    best = (fields.ts, number)
                break
        if best is not None:
            yield rest[best[1]].pop(0)


def key_bytes(text: str | None) -> tuple[bool, bytes]:
    """Order by bytes, none first."""
    return (text is not None, (text or "").encode("utf-8"))


@dataclass
class Report:
    """One arrival of an event."""

    ts: int
    watch_ms: int
    duration_ms: int
    request_id: str | None
    effective: bool
    late: bool
    history_only: bool


@dataclass
class Event:
    """An identity and its reports (§2); what it is follows from them each time it is asked."""

    type: str
    item_id: str
    event_id: str | None
    reports: list[Report] = field(default_factory=list)
    written: bool = False

    @property
    def key(self) -> tuple:
        if self.event_id is not None:
            return (self.type, "event_id", self.event_id)
        return (self.type, "item_id", self.item_id, self.reports[0].ts)

    @property
    def late(self) -> bool:
        return self.reports[0].late

    @property
    def known_ts(self) -> int:
        if self.late:
            return self.reports[0].ts
        return max(report.ts for report in self.reports if not report.late)

    @property
    def history_ts(self) -> int:
        return min([self.reports[0].ts, *(report.ts for report in self.reports if not report.late)])

    @property
    def positive(self) -> bool:
        if self.type == "watch":
            return any(report.effective for report in self.reports)
        return self.type in POSITIVE_INTERACTIONS

    def in_session(self) -> list[Report]:
        return [report for report in self.reports if not report.history_only]

    @property
    def ts(self) -> int:
        return min(report.ts for report in self.in_session())

    @property
    def watch_ms(self) -> int:
        return max(report.watch_ms for report in self.in_session())

    @property
    def duration_ms(self) -> int:
        return max(report.duration_ms for report in self.in_session())

    @property
    def effective(self) -> bool:
        return any(report.effective for report in self.in_session())

    @property
    def request_id(self) -> str | None:
        named = [report.request_id for report in self.in_session() if report.request_id is not None]
        return min(named, key=key_bytes) if named else None


@dataclass
class User:
    """Everything that ever came of one user."""

    user_id: str
    events: list[Event] = field(default_factory=list)
    seeds: list[tuple[int, str]] = field(default_factory=list)

    def history(self, before: float, length: int) -> list[str]:
        """H(before), §4."""
        newest: dict[str, int] = {}
        positives = [(event.history_ts, event.item_id) for event in self.events if event.positive]
        for ts, item_id in positives + self.seeds:
            if ts < before:
                newest[item_id] = max(ts, newest.get(item_id, ts))
        ordered = sorted(newest, key=lambda item_id: (newest[item_id], key_bytes(item_id)))
        return ordered[-length:]


@dataclass
class Cut:
    """A session before it is written: its watches in order, and its request in request mode."""

    user_id: str
    request_id: str | None
    watches: list[Event]

    @property
    def start(self) -> int:
        return self.watches[0].ts

    @property
    def end(self) -> int:
        return self.watches[-1].ts

    @property
    def session_id(self) -> str:
        parts = [self.user_id, str(self.start)] + ([] if self.request_id is None else [self.request_id])
        return ":".join(part.replace("%", "%25").replace(":", "%3A") for part in parts)


@dataclass
class Window:
    """A training target (§7)."""

    items: list[str]
    history: list[str]
    ts: int


class Reference:
    """The stream of §1-7, a line at a time.

    `now_ms` is the wall clock of all lines (§1); `seeds` are (user, item, pseudo-time) positives (§8).
    """

    def __init__(self, semantics: Semantics, now_ms: int, seeds: Iterable[tuple[str, str, int]] = ()) -> None:
        self.semantics = semantics
        self.now_ms = now_ms
        self.users: dict[str, User] = {}
        self.newest_ts: int | None = None
        self.events = self.duplicates = self.late = self.high_quality = 0
        self.dead_letters: list[tuple[bytes, str]] = []
        self.sessions: list[bytes] = []
        self.windows: list[list[Window]] = []
        self.items: list[Fields] = []
        self.dimension: int | None = None
        self.deadlines: list[tuple[int, str]] = []
        for user_id, item_id, ts in seeds:
            self.user(user_id).seeds.append((ts, item_id))

    def user(self, user_id: str) -> User:
        return self.users.setdefault(user_id, User(user_id))

    @property
    def watermark(self) -> int | None:
        if self.newest_ts is None:
            return None
        return self.newest_ts - self.semantics.stream.max_out_of_orderness_ms

    # -- events ------------------------------------------------------------------------------------------------

    def feed(self, lines: Iterable[bytes]) -> None:
        for raw in lines:
            self.line(raw)

    def line(self, raw: bytes) -> None:
        if is_blank(raw):
            return
        try:
            self.take(parse_line(raw, self.now_ms, self.semantics))
        except InvalidLine as reason:
            self.dead_letters.append((raw, str(reason)))

    def take(self, fields: Fields) -> None:
        if fields.type == "item":
            if fields.embedding is not None:
                if self.dimension not in (None, len(fields.embedding)):
                    raise InvalidLine("bad_embedding")
                self.dimension = len(fields.embedding)
            self.items.append(fields)
            return
        known = self.known(fields)
        if known is None:
            self.add(fields)
        elif known.item_id != fields.item_id:
            raise InvalidLine("identity_conflict")
        else:
            late = self.is_late(fields.ts)
            history_only = late or known.late or (known.type == "watch" and known.written)
            known.reports.append(self.report(fields, late=late, history_only=history_only))
            self.duplicates += 1
        self.events += 1
        self.newest_ts = fields.ts if self.newest_ts is None else max(self.newest_ts, fields.ts)
        self.write_final(fields.user_id)

    def known(self, fields: Fields) -> Event | None:
        """The event that this is a repeat of (§2)."""
        this = Event(fields.type, fields.item_id, fields.event_id, [self.report(fields, late=False, history_only=True)])
        same = [event for event in self.user_events(fields.user_id) if event.key == this.key]
        if not same:
            return None
        assert self.watermark is not None
        return same[-1] if same[-1].known_ts >= self.watermark - self.semantics.stream.dedup_horizon_ms else None

    def user_events(self, user_id: str) -> list[Event]:
        return self.users[user_id].events if user_id in self.users else []

    def add(self, fields: Fields) -> None:
        late = self.is_late(fields.ts)
        if not late and self.open_events(fields.user_id) > self.semantics.stream.max_open_events:
            raise InvalidLine("user_overflow")
        event = Event(fields.type, fields.item_id, fields.event_id)
        event.reports.append(self.report(fields, late=late, history_only=late))
        self.user(fields.user_id).events.append(event)
        self.late += late

    def is_late(self, ts: int) -> bool:
        return self.watermark is not None and ts < self.watermark

    def report(self, fields: Fields, *, late: bool, history_only: bool) -> Report:
        """§4: a report is effective by its own durations."""
        limit = self.semantics.watch.effective_ms
        effective = fields.watch_ms >= limit or (0 < fields.duration_ms <= limit and fields.watch_ms >= fields.duration_ms)
        return Report(fields.ts, fields.watch_ms, fields.duration_ms, fields.request_id, effective, late, history_only)

    def open_events(self, user_id: str) -> int:
        """How much of a user is still open (§2, max_open_events)."""
        starts = [cut.start for cut in self.cuts(user_id)]
        count = 0
        for event in self.user_events(user_id):
            if event.late or event.written:
                continue
            if event.type == "watch" or not self.is_late(event.ts) or any(start <= event.ts for start in starts):
                count += 1
        return count

    # -- sessions ----------------------------------------------------------------------------------------------

    def cuts(self, user_id: str) -> list[Cut]:
        """The sessions that are not written yet, as they stand (§5)."""
        config = self.semantics.session
        watches = [e for e in self.user_events(user_id) if e.type == "watch" and not e.late and not e.written]
        watches.sort(key=lambda event: (event.ts, key_bytes(event.item_id), key_bytes(event.event_id)))
        groups: dict[str | None, list[Event]] = {}
        for watch in watches:
            groups.setdefault(watch.request_id if config.by == "request" else None, []).append(watch)
        cuts: list[Cut] = []
        for request_id, group in groups.items():
            current: Cut | None = None
            for watch in group:
                if (
                    current is None
                    or watch.ts - current.end > config.gap_ms
                    or watch.ts - current.start > config.max_ms
                    or (len(current.watches) >= config.max_items and watch.ts > current.end)
                ):
                    current = Cut(user_id, request_id, [])
                    cuts.append(current)
                current.watches.append(watch)
        return cuts

    def owner(self, interaction: Event, cuts: list[Cut]) -> Cut | None:
        """The session that an interaction belongs to (§5)."""
        config = self.semantics.session
        delay = config.gap_ms if config.feedback_delay_ms is None else min(config.feedback_delay_ms, config.gap_ms)
        qualified = [
            cut
            for cut in cuts
            if cut.start <= interaction.ts <= cut.end + delay
            and any(watch.item_id == interaction.item_id for watch in cut.watches)
        ]
        if interaction.request_id is not None:
            own = [cut for cut in qualified if cut.request_id == interaction.request_id]
            qualified = own or qualified
        return min(qualified, key=lambda cut: (cut.start, key_bytes(cut.session_id)), default=None)

    def write_final(self, touched: str) -> None:
        """Writes every session that the watermark has passed.

        The deadlines spare the look at users of whom nothing can have become final.
        """
        assert self.watermark is not None
        for cut in self.cuts(touched):
            heapq.heappush(self.deadlines, (cut.end + self.semantics.session.gap_ms, touched))
        due = set()
        while self.deadlines and self.deadlines[0][0] < self.watermark:
            due.add(heapq.heappop(self.deadlines)[1])
        cuts = [cut for user_id in due for cut in self.cuts(user_id)]
        self.write([cut for cut in cuts if self.watermark > cut.end + self.semantics.session.gap_ms])

    def flush(self) -> None:
        self.write([cut for user_id in self.users for cut in self.cuts(user_id)])

    def write(self, final: list[Cut]) -> None:
        for cut in sorted(final, key=lambda cut: (cut.end, key_bytes(cut.session_id))):
            self.write_one(cut)

    def write_one(self, cut: Cut) -> None:
        user = self.users[cut.user_id]
        cuts = self.cuts(cut.user_id)
        feedback = []
        for event in user.events:
            if event.type == "watch" or event.late or event.written:
                continue
            owner = self.owner(event, cuts)
            if owner is not None and owner.watches == cut.watches:
                feedback.append(event)
        feedback.sort(key=lambda event: (event.ts, event.type, key_bytes(event.event_id)))
        types: list[list[str]] = [[] for _ in cut.watches]
        for event in feedback:
            places = [i for i, watch in enumerate(cut.watches) if watch.item_id == event.item_id]
            before = [i for i in places if cut.watches[i].ts <= event.ts]
            types[before[-1] if before else places[0]].append(event.type)

        config, length = self.semantics.session, self.semantics.history.length
        watched = sum(watch.effective for watch in cut.watches)
        total_watch_ms = sum(watch.watch_ms for watch in cut.watches)
        positive = sum(event.type in POSITIVE_INTERACTIONS for event in feedback)
        high_quality = (
            watched >= config.min_watched
            and total_watch_ms >= config.min_total_watch_ms
            and positive >= config.min_interactions
        )
        history = user.history(cut.start, length)
        value = {
            "session_id": cut.session_id,
            "user_id": cut.user_id,
            "request_id": cut.request_id,
            "start": cut.start,
            "end": cut.end,
            "items": [
                {
                    "item_id": watch.item_id,
                    "ts": watch.ts,
                    "watch_ms": watch.watch_ms,
                    "duration_ms": watch.duration_ms,
                    "interactions": types[i],
                }
                for i, watch in enumerate(cut.watches)
            ],
            "history": history,
            "watched": watched,
            "total_watch_ms": total_watch_ms,
            "interactions": positive,
            "high_quality": high_quality,
            "labels": {
                "swt": min(1.0, total_watch_ms / config.swt_cap_ms),
                "vtr": watched / len(cut.watches),
                "wtr": int(any(event.type == "follow" for event in feedback)),
                "ltr": int(any(event.type == "like" for event in feedback)),
            },
        }
        self.sessions.append(orjson.dumps(value))
        self.high_quality += high_quality
        self.windows.append(self.targets(user, cut, history))
        for event in [*cut.watches, *feedback]:
            event.written = True

    def targets(self, user: User, cut: Cut, history: list[str]) -> list[Window]:
        """§7, for sessions of any quality."""
        count, m = len(cut.watches), self.semantics.session.target_items
        starts = list(range(0, count - m + 1, m)) if count >= m else [0]
        if count > m and count % m:
            starts.append(count - m)
        windows = []
        for first in starts:
            ts = cut.watches[first].ts
            before = history if first == 0 else user.history(ts, self.semantics.history.length)
            windows.append(Window([watch.item_id for watch in cut.watches[first : first + m]], before, ts))
        return windows

    # -- what the commands print -------------------------------------------------------------------------------

    def histories(self) -> list[bytes]:
        """`onerec histories --json`, §9."""
        seen = sorted((user for user in self.users.values() if user.events), key=lambda user: key_bytes(user.user_id))
        length = self.semantics.history.length
        return [orjson.dumps({"user_id": u.user_id, "items": u.history(math.inf, length)}) for u in seen]

    def counters(self) -> dict[str, int | None]:
        """The last line of `onerec replay --json`, without its times (§9)."""
        return {
            "events": self.events,
            "duplicates": self.duplicates,
            "late": self.late,
            "dead_letters": len(self.dead_letters),
            "users": sum(bool(user.events) for user in self.users.values()),
            "sessions": len(self.sessions),
            "high_quality": self.high_quality,
            "watermark": self.watermark,
        }


def kuairand_lines(path: Path) -> Iterator[bytes]:
    """The events of a KuaiRand log as lines of §1 (§8)."""
    flags = {
        "is_like": "like",
        "is_follow": "follow",
        "is_forward": "share",
        "is_comment": "comment",
        "is_hate": "dislike",
    }
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            event = {"user_id": row["user_id"], "item_id": row["video_id"], "ts": int(row["time_ms"])}
            watch = {"watch_ms": int(row["play_time_ms"]), "duration_ms": int(row["duration_ms"])}
            yield orjson.dumps({"type": "watch", **event, **watch})
            for column, type_ in flags.items():
                if int(row[column]):
                    yield orjson.dumps({"type": type_, **event})


def kuairand_seeds(path: Path) -> Iterator[tuple[str, str, int]]:
    """The positives of a history file, as (user, item, pseudo-time) (§8)."""
    with gzip.open(path, "rb") as file:
        for line in file:
            row = orjson.loads(line)
            positives = [*row["long_watch_seq"], *row["like_seq"]]
            for index, item_id in enumerate(positives):
                yield str(row["user_id"]), str(item_id), row["last_time_ms"] - (len(positives) - 1 - index)
