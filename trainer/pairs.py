"""The pair log RUN/pairs/pairs.log: what the sample server made of each sampled session, once, for the trainer to read.

A file of frames behind a magic line; a frame is length, crc32 of the payload, crc32 of these two, each 4 bytes little
endian, then the payload: a record as msgpack. One process appends (`PairLog`), any number read beside it (`PairReader`).
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import struct
import zlib
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

from onerec.closing import Closing
from onerec.errors import Failure, UserError
from onerec.files import sync_path

MAGIC = b"ORPAIR1\n"
_HEADER = struct.Struct("<III")
_LONGEST = 1 << 26
SCAN = 1_000
"""Records read at a stretch where a log is gone through."""
BACK = 4_096
"""Records whose ends a reader remembers: who takes fewer than it read comes back for the rest."""


class Pair(msgspec.Struct, frozen=True, kw_only=True, tag="pair"):
    """A preference pair of one sampled session (paper Algorithm 2, eq. 9-10), with what M_t thought of it.

    `number` counts all records of the log from 1, pairs and drops alike. `sequence`: the session's place in its log.
    `snapshot_step`, `snapshot_version`: which checkpoint was M_t. `history`: codes [h][L] as M_t read it, oldest first;
    `chosen` [m][L] and `rejected` [R][m][L], the lowest reward first. Log-probabilities are M_t's, in nats;
    rewards are the towers swt, vtr, wtr, ltr; `margin` is R(chosen) - R(nearest loser). `source`: partition and offset
    in the topic `preference-pairs`, where it came from there. `ended`: event time in ms of the session's end, None in records
    of before.
    """

    number: int
    session_id: str
    sequence: int
    snapshot_step: int
    snapshot_version: int
    codebook_version: str
    history: list[list[int]]
    chosen: list[list[int]]
    rejected: list[list[list[int]]]
    chosen_log_prob: float
    rejected_log_probs: list[float]
    chosen_reward: list[float]
    rejected_rewards: list[list[float]]
    margin: float
    source: tuple[int, int] | None = None
    ended: int | None = None


class Drop(msgspec.Struct, frozen=True, kw_only=True, tag="drop"):
    """A sampled session that gave no pair; `reason` is one of `trainer.sampling.REASONS`, the rest as in `Pair`."""

    number: int
    session_id: str
    sequence: int
    snapshot_step: int
    reason: str
    source: tuple[int, int] | None = None
    ended: int | None = None


Record = Pair | Drop
AnyRecord = TypeVar("AnyRecord", Pair, Drop, Record)
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Record)


def encode_record(record: Record) -> bytes:
    """A record as msgpack, without a frame."""
    return _encoder.encode(record)


def decode_record(data: bytes | memoryview) -> Record:
    """Inverse of `encode_record`; raises msgspec.DecodeError for anything else."""
    return _decoder.decode(data)


def pairs_path(run_dir: Path) -> Path:
    """RUN/pairs/pairs.log."""
    return run_dir / "pairs" / "pairs.log"


def is_sampled(session_id: str, ratio: float) -> bool:
    """Whether a session is in the share r_DPO: a hash of its id, so the same in every run.

    Which sessions `trainer.evaluate.is_scored` says nothing of which become pairs: a crc32 of the id with a prefix would,
    as it is linear.
    """
    return int.from_bytes(hashlib.blake2b(session_id.encode(), digest_size=4).digest()) < ratio * 2**32


def _frame(payload: bytes) -> bytes:
    start = struct.pack("<II", len(payload), zlib.crc32(payload))
    return start + struct.pack("<I", zlib.crc32(start)) + payload


def _damaged(path: Path, place: int, what: str) -> UserError:
    return UserError(
        f"{path} is damaged at byte {place}: {what}; bring the file back from a copy, or give a new --run"
    )


def _frames(path: Path, data: bytes, base: int, number: int | None) -> Iterator[tuple[int, Record]]:
    """(byte behind the frame, record) of the whole frames in `data`, which stands at byte `base` of the file.

    `number` is the record before the first one (None: not known); a torn frame at the end ends the iteration.
    """
    place = 0
    while len(data) - place >= _HEADER.size:
        length, digest, header_digest = _HEADER.unpack_from(data, place)
        if zlib.crc32(data[place : place + 8]) != header_digest or length > _LONGEST:
            # A machine that lost its power leaves zeros where the last frame should be.
            if not any(data[place:]):
                return
            raise _damaged(path, base + place, "no frame begins here")
        end = place + _HEADER.size + length
        if end > len(data):
            return
        payload = data[place + _HEADER.size : end]
        if zlib.crc32(payload) != digest:
            raise _damaged(path, base + place, "the record does not fit its checksum")
        try:
            record = decode_record(payload)
        except msgspec.DecodeError as error:
            raise _damaged(path, base + place, f"the record cannot be read ({error})") from None
        if number is not None and record.number != number + 1:
            raise _damaged(path, base + place, f"record {record.number} stands where {number + 1} belongs")
        number, place = record.number, end
        yield base + place, record


class PairIndex:
    """What the records seen so far amount to.

    `last`: number of the last one, `last_sequence`: its session's place (0: none yet). `session_ids`: of all; `pairs`: number
    and snapshot version of each pair; `drops`: how many for which reason; `offsets`: the last `source` offset of each
    partition.
    """

    def __init__(self) -> None:
        self.last = self.last_sequence = 0
        self.session_ids: set[str] = set()
        self.pairs: list[tuple[int, int]] = []
        self.drops: Counter[str] = Counter()
        self.offsets: dict[int, int] = {}

    def note(self, record: Record) -> None:
        """Takes in the next record."""
        self.last, self.last_sequence = record.number, record.sequence
        self.session_ids.add(record.session_id)
        if isinstance(record, Pair):
            self.pairs.append((record.number, record.snapshot_version))
        else:
            self.drops[record.reason] += 1
        if record.source is not None:
            self.offsets[record.source[0]] = record.source[1]

    def pairs_between(self, after: int, last: int) -> list[int]:
        """Snapshot versions of the pairs with a number greater than `after`, up to `last`."""
        begin, end = (bisect_right(self.pairs, number, key=lambda pair: pair[0]) for number in (after, last))
        return [version for _, version in self.pairs[begin:end]]


class PairLog(PairIndex, Closing):
    """The one writer of a pair log. A tail that a kill has cut is taken away; records are on the disk once `append` returns.

    Raises UserError for a foreign or damaged file, or where another process writes; Failure where the disk refuses.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self._file = -1
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            self._lock()
            size = self._read()
            if not size:
                os.ftruncate(self._file, 0)
                os.pwrite(self._file, MAGIC, 0)
                os.fsync(self._file)
                sync_path(path.parent)
                size = len(MAGIC)
            if os.fstat(self._file).st_size != size:
                os.ftruncate(self._file, size)
            os.lseek(self._file, size, os.SEEK_SET)
        except OSError as error:
            self.close()
            raise Failure(f"{path} cannot be opened: {error.strerror}; mend permissions or disk") from error
        except UserError:
            self.close()
            raise

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another sampler writes {self.path}; stop it, or give another --run") from None

    def _read(self) -> int:
        """Take in what the file holds; the byte behind the last whole frame, 0 for a file that holds nothing yet."""
        with PairReader(self.path) as reader:
            while records := reader.read(self.last, SCAN):
                for record in records:
                    self.note(record)
            return reader.end

    def append(self, records: Sequence[Record]) -> list[Record]:
        """Write records with the numbers that follow, whatever they say themselves, and force them to the disk."""
        numbered: list[Record] = [
            msgspec.structs.replace(record, number=self.last + place) for place, record in enumerate(records, 1)
        ]
        data = memoryview(b"".join(_frame(encode_record(record)) for record in numbered))
        end = os.lseek(self._file, 0, os.SEEK_CUR)
        try:
            while data:
                data = data[os.write(self._file, data) :]
            os.fsync(self._file)
        except OSError as error:
            # Nothing of the batch is there: what would follow must not stand behind half a frame.
            os.ftruncate(self._file, end)
            os.lseek(self._file, end, os.SEEK_SET)
            raise Failure(f"{self.path} cannot be written: {error.strerror}; free space and start again") from error
        for record in numbered:
            self.note(record)
        return numbered

    def close(self) -> None:
        """Release the file and with it the lock."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


class PairReader(Closing):
    """Reads a pair log beside its writer. A frame not yet whole is not there yet; nothing blocks.

    `end`: the byte behind the last record read, 0 where the file holds nothing yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.end = 0
        self._file = -1
        self._place, self._number = len(MAGIC), 0
        self._ends: deque[tuple[int, int]] = deque(maxlen=BACK)

    def read(self, after: int, limit: int) -> list[Record]:
        """At most `limit` records whose number is greater than `after`, in order.

        Raises UserError where the file is foreign or damaged, naming file, byte and remedy.
        """
        if not self._open():
            return []
        if after < self._number:
            self._go_back(after)
        found: list[Record] = []
        while len(found) < limit:
            size = os.fstat(self._file).st_size
            data = os.pread(self._file, 1 << 20, self._place)
            if len(data) >= _HEADER.size:
                # A record longer than the block is read whole.
                needed = _HEADER.size + _HEADER.unpack_from(data)[0]
                if len(data) < needed <= min(size - self._place, _LONGEST):
                    data = os.pread(self._file, needed, self._place)
            before = self._place
            for end, record in _frames(self.path, data, self._place, self._number):
                if len(found) == limit:
                    break
                self._place, self._number = end, record.number
                self._ends.append((record.number, end))
                if record.number > after:
                    found.append(record)
            if self._place == before:
                break
        self.end = self._place
        return found

    def _go_back(self, after: int) -> None:
        """To behind record `after`, where that was read of late, else to the beginning."""
        while self._ends and self._ends[-1][0] > after:
            self._ends.pop()
        self._number, self._place = self._ends[-1] if self._ends else (0, len(MAGIC))

    def _open(self) -> bool:
        """Whether the file is there, with its first line."""
        if self._file < 0:
            try:
                self._file = os.open(self.path, os.O_RDONLY)
            except FileNotFoundError:
                return False
            except OSError as error:
                raise Failure(f"{self.path} cannot be read: {error.strerror}; mend its permissions") from error
        head = os.pread(self._file, len(MAGIC), 0)
        if head == MAGIC:
            return True
        if MAGIC.startswith(head):
            return False
        raise UserError(f"{self.path} is not a pair log; move it away, or give another --run")

    def close(self) -> None:
        """Release the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
