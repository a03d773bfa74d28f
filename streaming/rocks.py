"""RocksDB as this project opens it: one set of options, one set of error texts."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from rocksdict import BlockBasedOptions, Cache, DBCompressionType, Options

from onerec.errors import Failure, OneRecError, UserError

WORKER: Final = b"worker "
"""How the format of a stream worker's state begins, which carries partitions in its keys."""


def database_path(state: Path) -> Path:
    """Where the database of a state lies."""
    return Path(state) / "db"


def database_options(secondary: bool = False) -> Options:
    """Raw mode, and memory that stays flat however long the log."""
    options = Options(raw_mode=True)
    options.create_if_missing(True)
    options.create_missing_column_families(True)
    options.set_max_background_jobs(2)
    options.set_keep_log_file_num(2)
    # One bound for all memtables, and index blocks inside the cache.
    options.set_write_buffer_size(32 << 20)
    options.set_db_write_buffer_size(96 << 20)
    options.set_max_total_wal_size(256 << 20)
    options.set_max_open_files(-1 if secondary else 512)
    options.set_compression_type(DBCompressionType.lz4())
    table = BlockBasedOptions()
    table.set_block_cache(Cache(64 << 20))
    table.set_bloom_filter(10, False)
    table.set_cache_index_and_filter_blocks(True)
    table.set_block_size(16 << 10)
    options.set_block_based_table_factory(table)
    return options


def open_error(state: Path, error: Exception) -> OneRecError:
    """Why a database cannot be opened for writing, and what to do."""
    if "lock" in str(error).lower():
        return UserError(
            f"state {state} is being written by another process (replay, run or stream); "
            "stop that one, or give --state another folder"
        )
    if "Column family" in str(error) or "Invalid argument" in str(error):
        return UserError(f"state {state}: a database of another program; give --state another folder")
    return Failure(f"state {state} cannot be opened: {error}")


def write_error(state: Path, error: Exception) -> Failure:
    """Why a batch could not be written, and what to do."""
    return Failure(
        f"state {state}: the disk refused a write ({error}); the last batch is not stored, all before it is. "
        "Free some space and run the same command again: it goes on from there"
    )
