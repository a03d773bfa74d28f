"""The pair log: what was appended is read, once and in order, whatever a kill has left at its end."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from onerec.errors import Failure, UserError
from trainer.evaluate import is_scored
from trainer.pairs import Drop, Pair, PairLog, PairReader, Record, is_sampled, pairs_path


def pair(sequence: int, history: int = 2, version: int = 1) -> Pair:
    return Pair(
        number=0, session_id=f"u{sequence}:1", sequence=sequence, snapshot_step=10, snapshot_version=version,
        codebook_version="c", history=[[1, 2]] * history, chosen=[[1, 2], [3, 4]], rejected=[[[5, 6], [7, 0]]],
        chosen_log_prob=-1.5, rejected_log_probs=[-2.5], chosen_reward=[0.5] * 4, rejected_rewards=[[0.25] * 4], margin=0.25,
    )


def drop(sequence: int) -> Drop:
    return Drop(number=0, session_id=f"u{sequence}:1", sequence=sequence, snapshot_step=10, reason="tie")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return pairs_path(tmp_path)


def read(path: Path, after: int = 0, limit: int = 1000) -> list[Record]:
    with PairReader(path) as reader:
        return reader.read(after, limit)


def test_records_are_numbered_in_order_and_read_from_any_place(path: Path) -> None:
    with PairReader(path) as reader:
        assert reader.read(0, 10) == []
        with PairLog(path) as log:
            written = log.append([pair(3), drop(5)]) + log.append([pair(9)])
            assert reader.read(0, 10) == written
            assert [record.number for record in written] == [1, 2, 3]
            assert reader.read(0, 2) == written[:2] and reader.read(2, 9) == written[2:] and reader.read(1, 1) == written[1:2]
            assert reader.read(3, 9) == []
            log.append([drop(10)])
            assert [record.sequence for record in reader.read(3, 9)] == [10]
    with PairLog(path) as log:
        assert (log.last, log.last_sequence, log.drops) == (4, 10, {"tie": 2})
        assert log.session_ids == {"u3:1", "u5:1", "u9:1", "u10:1"}
        assert log.pairs_between(0, 4) == [1, 1] and log.pairs_between(1, 3) == [1] and log.pairs_between(3, 4) == []


def test_a_reader_that_comes_back_for_the_rest_gets_the_same_records(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.pairs.BACK", 4)
    with PairLog(path) as log:
        written = log.append([drop(number) for number in range(1, 21)])
    places: list[int] = []
    pread = os.pread

    def counted(file: int, size: int, place: int) -> bytes:
        places.append(place)
        return pread(file, size, place)

    monkeypatch.setattr(os, "pread", counted)
    with PairReader(path) as reader:
        for after, limit in ((0, 10), (7, 10), (9, 2), (3, 5), (18, 9), (0, 20)):
            assert reader.read(after, limit) == written[after : after + limit]
        places.clear()
        assert reader.read(17, 20) == written[17:]
        assert min(place for place in places if place) > 200, "not from the beginning"


def test_a_tail_cut_at_any_byte_is_not_read_and_is_replaced(path: Path) -> None:
    with PairLog(path) as log:
        log.append([pair(1), drop(2)])
        whole = path.stat().st_size
        log.append([drop(3)])
    data = path.read_bytes()
    for size in range(whole, len(data), 3):
        path.write_bytes(data[:size])
        with PairReader(path) as reader:
            assert [record.sequence for record in reader.read(0, 9)] == [1, 2]
            with PairLog(path) as log:
                assert (log.last, log.last_sequence) == (2, 2)
                log.append([drop(4)])
            assert [record.sequence for record in reader.read(2, 9)] == [4]
    for size in (0, 1, 7):
        path.write_bytes(data[:size])
        assert read(path) == []
        with PairLog(path) as log:
            log.append([drop(7)])
        assert [record.sequence for record in read(path)] == [7]


def test_zeros_that_a_power_failure_left_are_cut(path: Path) -> None:
    with PairLog(path) as log:
        log.append([pair(1)])
    path.write_bytes(path.read_bytes() + bytes(4096))
    assert [record.sequence for record in read(path)] == [1]
    with PairLog(path) as log:
        log.append([drop(2)])
    assert [record.sequence for record in read(path)] == [1, 2]


def test_a_flipped_bit_anywhere_before_the_tail_is_refused_by_name(path: Path) -> None:
    with PairLog(path) as log:
        log.append([pair(1), pair(2)])
    data = path.read_bytes()
    for place in range(8, len(data), 11):
        path.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        with pytest.raises(UserError, match=r"pairs\.log is damaged at byte \d+: .*new --run"):
            read(path)
        with pytest.raises(UserError, match="is damaged at byte"):
            PairLog(path)


def test_a_missing_record_is_refused(path: Path, tmp_path: Path) -> None:
    with PairLog(path) as log:
        log.append([drop(1)])
        first = path.stat().st_size
        log.append([drop(2)])
        second = path.stat().st_size
        log.append([drop(3)])
    data = path.read_bytes()
    path.write_bytes(data[:first] + data[second:])
    with pytest.raises(UserError, match="record 3 stands where 2 belongs"):
        read(path)


def test_a_foreign_file_and_a_second_writer_are_refused(path: Path) -> None:
    with PairLog(path), pytest.raises(UserError, match="another sampler writes"):
        PairLog(path)
    path.write_bytes(b"something else")
    for opened in (PairLog, read):
        with pytest.raises(UserError, match="is not a pair log"):
            opened(path)


def test_a_record_longer_than_a_block_is_read(path: Path) -> None:
    with PairLog(path) as log:
        log.append([drop(1), pair(2, history=400_000), drop(3)])
    assert path.stat().st_size > 1 << 20
    assert [record.sequence for record in read(path)] == [1, 2, 3]


def test_a_full_disk_leaves_the_log_as_it_was(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write: Callable[..., int] = os.write

    def full(file: int, data: Any) -> int:
        write(file, bytes(data)[:20])
        raise OSError(errno.ENOSPC, "No space left on device")

    with PairLog(path) as log:
        log.append([pair(1)])
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full)
            with pytest.raises(Failure, match=r"cannot be written: No space left on device"):
                log.append([pair(2), pair(3)])
        assert log.last == 1 and log.session_ids == {"u1:1"}
        log.append([drop(4)])
    assert [record.sequence for record in read(path)] == [1, 4]


def test_the_sampled_share_is_the_ratio_and_says_nothing_of_the_scored_share() -> None:
    ids = [f"user{i}:{1_700_000_000_000 + 977 * i}" for i in range(40_000)]
    sampled = [is_sampled(name, 0.1) for name in ids]
    both = sum(chosen and is_scored(name, 0.1) for name, chosen in zip(ids, sampled, strict=True))
    assert abs(sum(sampled) / len(ids) - 0.1) < 0.01 and abs(both / len(ids) - 0.01) < 0.003
    assert not any(is_sampled(name, 0.0) for name in ids) and all(is_sampled(name, 1.0) for name in ids)
    assert all(is_sampled(name, 0.2) for name, chosen in zip(ids, sampled, strict=True) if chosen)
