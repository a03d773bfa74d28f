"""Item sequences without times, for published leave-one-out tables: last item of a user test, the one before validation.

`FILE` holds lines `user item item …`. An imported data set is a folder of `dataset.json` and `arrays.npz`.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np
import orjson
from numpy.typing import NDArray

from onerec.errors import Failure, UserError
from onerec.files import sync_path
from trainer.baselines.fitting import Held
from trainer.behaviour import Behaviour, cooccurrence, factorise
from trainer.code_files import load_codes
from trainer.semantic_ids import default_codes, fit
from trainer.vectors import check_item_id

FORMAT = "onerec-sequences"
FORMAT_VERSION = 1
TESTED = 3
"""Items that a user needs to be tested: one to learn from, one to validate, one to test."""


class Description(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`dataset.json`: what the arrays beside it mean.

    `made`: whether the semantic IDs were made here, from training items only; `codes`: K; `sha256` of `arrays.npz`.
    """

    format: str
    format_version: int
    source: str
    users: list[str]
    items: list[str]
    levels: int
    codes: int
    made: bool
    sha256: str


class Dataset(msgspec.Struct, frozen=True, kw_only=True):
    """An imported file; items are rows of `items`, which are in the order of their ids.

    `sequences`: a row array int32 for each user, oldest first; `item_codes` int32 [N, L], each below `codes`; `features`
    int32 [N, F], categories given with the file, -1 for none.
    """

    source: str
    users: list[str]
    items: list[str]
    sequences: list[NDArray[np.int32]]
    item_codes: NDArray[np.int32]
    codes: int
    made: bool
    features: NDArray[np.int32]

    def training(self) -> list[list[int]]:
        """What may be learnt: all but the last two items of a tested user, everything of a user who is not."""
        return training_part(self.sequences)

    def validation(self) -> Held:
        """The item before the last of each tested user, after what is before it."""
        tested = [row.tolist() for row in self.sequences if len(row) >= TESTED]
        return Held([row[:-2] for row in tested], [row[-2] for row in tested])

    def test(self) -> Held:
        """The last item of each tested user, after everything before it, the validation item too."""
        tested = [row.tolist() for row in self.sequences if len(row) >= TESTED]
        return Held([row[:-1] for row in tested], [row[-1] for row in tested])

    def counts(self) -> dict[str, int]:
        """What the import found, for people."""
        lengths = np.array([len(row) for row in self.sequences])
        learnt = np.unique(np.concatenate([np.array(row, np.int64) for row in self.training()]))
        _, sharing = np.unique(self.item_codes, axis=0, return_counts=True)
        return {
            "users": len(self.users),
            "items": len(self.items),
            "interactions": int(lengths.sum()),
            "tested_users": int((lengths >= TESTED).sum()),
            "training_only_users": int((lengths < TESTED).sum()),
            "items_never_in_training": len(self.items) - len(learnt),
            "levels": self.item_codes.shape[1],
            "codes": self.codes,
            "semantic_ids": len(sharing),
            "items_sharing_an_id": int(sharing[sharing > 1].sum()),
        }


def training_part(sequences: Sequence[NDArray[np.int32]]) -> list[list[int]]:
    """Sequences without the last two items, those shorter than three whole."""
    return [(row[:-2] if len(row) >= TESTED else row).tolist() for row in sequences]


def read_sequences(path: Path) -> tuple[list[str], list[list[str]]]:
    """Users and their items, in the order of the file.

    Raises UserError naming file, line and remedy: no such file, no UTF-8, a user without items or met before, an id that
    is too long, no user with three items.
    """
    if not path.is_file():
        raise UserError(f"sequences {path}: no such file; give a file of lines `user item item …`")
    lines_of: dict[str, int] = {}
    items: list[list[str]] = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            place = f"sequences {path} line {number}"
            try:
                words = line.decode("utf-8-sig" if number == 1 else "utf-8").split()
            except UnicodeDecodeError as error:
                raise UserError(f"{place} is not UTF-8 (byte {error.start + 1}); write the file in UTF-8") from None
            if not words:
                continue
            user = words[0]
            if len(words) == 1:
                raise UserError(f"{place}: user {user!r:.60} has no item; write `user item item …` or delete the line")
            if user in lines_of:
                raise UserError(f"{place}: user {user!r:.60} stands in line {lines_of[user]} too; join the two lines")
            lines_of[user] = number
            items.append([check_item_id(word, place) for word in words[1:]])
    if not any(len(row) >= TESTED for row in items):
        raise UserError(
            f"sequences {path}: no user of {len(items):,} has {TESTED} items, so none can be tested; "
            "the last is for the test, the one before for validation, and one is needed to learn from"
        )
    return list(lines_of), items


def import_sequences(
    path: Path,
    *,
    codes_file: Path | None = None,
    features_file: Path | None = None,
    levels: int = 3,
    size: int | None = None,
    dimension: int = 64,
    iterations: int = 20,
    seed: int = 0,
    say: Callable[[str], None] = lambda text: None,
) -> Dataset:
    """The data set of a file of sequences, with semantic IDs given (`codes_file`) or made.

    size: K; by default of the catalogue's size, or of the largest code given. IDs are made by balanced residual k-means on
    vectors of which items stand near each other in the training part: no validation or test item has a say. Raises
    UserError as `read_sequences` and `load_codes` do, and for an item without a semantic ID.
    """
    users, words = read_sequences(path)
    items = sorted({word for row in words for word in row})
    index = {item: row for row, item in enumerate(items)}
    sequences = [np.array([index[word] for word in row], np.int32) for row in words]
    if codes_file is None:
        codes = size or default_codes(len(items))
        say(f"making semantic IDs: {levels} levels of {codes:,} codes for {len(items):,} items")
        vectors = training_vectors(sequences, items, dimension, seed)
        item_codes = fit(
            vectors, levels=levels, codes=codes, method="deferred", iterations=iterations,
            rng=np.random.default_rng(seed),
        ).codes
    else:
        item_codes = _given_codes(codes_file, items, size)
        codes = size or int(item_codes.max()) + 1
    return Dataset(
        source=path.name,
        users=users,
        items=items,
        sequences=sequences,
        item_codes=np.ascontiguousarray(item_codes, np.int32),
        codes=codes,
        made=codes_file is None,
        features=_given_features(features_file, items),
    )


def training_vectors(
    sequences: Sequence[NDArray[np.int32]], items: list[str], dimension: int, seed: int
) -> NDArray[np.float32]:
    """Vectors float32 [N, d] from the training part; zero for an item that is not in it."""
    training = training_part(sequences)
    rows = np.array([row for sequence in training for row in sequence], np.int32)
    behaviour = Behaviour(
        item_ids=items,
        items=rows,
        weights=np.ones(len(rows), np.float32),
        lists=np.repeat(np.arange(len(training), dtype=np.int32), [len(sequence) for sequence in training]),
        counts=np.bincount(rows, minlength=len(items)).astype(np.float64),
        last_session=0,
    )
    return factorise(cooccurrence(behaviour), dimension, seed)


def save(dataset: Dataset, folder: Path) -> None:
    """Write a data set into a new folder, complete or not at all; UserError where it exists, Failure of the disk."""
    if folder.exists():
        raise UserError(f"--out {folder} exists already; name a new folder or remove that one")
    lengths = [len(row) for row in dataset.sequences]
    stream = io.BytesIO()
    np.savez_compressed(
        stream,
        sequences=np.concatenate(dataset.sequences),
        offsets=np.cumsum([0, *lengths]).astype(np.int64),
        item_codes=dataset.item_codes,
        features=dataset.features,
    )
    content = stream.getvalue()
    description = Description(
        format=FORMAT,
        format_version=FORMAT_VERSION,
        source=dataset.source,
        users=dataset.users,
        items=dataset.items,
        levels=dataset.item_codes.shape[1],
        codes=dataset.codes,
        made=dataset.made,
        sha256=hashlib.sha256(content).hexdigest(),
    )
    building = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        building.mkdir(parents=True)
        for name, data in (("arrays.npz", content), ("dataset.json", msgspec.json.encode(description))):
            (building / name).write_bytes(data)
            sync_path(building / name)
        building.rename(folder)
        sync_path(folder.parent)
    except OSError as error:
        raise Failure(f"{folder} cannot be written: {error.strerror}; mend permissions or disk") from error


def load(folder: Path) -> Dataset:
    """The data set that `save` wrote.

    Raises UserError for a folder that is none, of another format version, or damaged.
    """
    again = "make it with `onerec import sequences FILE --out DIR`"
    try:
        description = msgspec.json.decode((folder / "dataset.json").read_bytes(), type=Description)
        content = (folder / "arrays.npz").read_bytes()
    except OSError as error:
        raise UserError(f"{folder} holds no imported sequences ({error.filename}: {error.strerror}); {again}") from None
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise UserError(f"{folder}/dataset.json cannot be read: {error}; {again} anew") from None
    if (description.format, description.format_version) != (FORMAT, FORMAT_VERSION):
        raise UserError(
            f"{folder} is {description.format} version {description.format_version}, this program reads {FORMAT} "
            f"version {FORMAT_VERSION}; {again} anew"
        )
    if hashlib.sha256(content).hexdigest() != description.sha256:
        raise UserError(f"{folder}/arrays.npz is damaged: its sha256 is not that of dataset.json; {again} anew")
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        return Dataset(
            source=description.source,
            users=description.users,
            items=description.items,
            sequences=np.split(arrays["sequences"], arrays["offsets"][1:-1]),
            item_codes=arrays["item_codes"],
            codes=description.codes,
            made=description.made,
            features=arrays["features"],
        )


def _given_codes(path: Path, items: list[str], size: int | None) -> NDArray[np.int32]:
    """Codes [N, L] of every item of the sequences; those of other items are left out."""
    table = load_codes(path, size)
    place = {item: row for row, item in enumerate(table.item_ids)}
    missing = [item for item in items if item not in place]
    if missing:
        raise UserError(
            f"codes {path}: {len(missing):,} of the {len(items):,} items have no semantic ID, first {missing[0]!r:.60}; "
            "add them, or leave --codes out to have IDs made"
        )
    return table.codes_NL[[place[item] for item in items]]


def _given_features(path: Path | None, items: list[str]) -> NDArray[np.int32]:
    """Categories int32 [N, F] of the items: `{"item": ["value", …]}`, the same number of places each, null for none."""
    if path is None:
        return np.empty((len(items), 0), np.int32)
    try:
        values = orjson.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"features {path} cannot be read: {error.strerror}; give --features a JSON file") from None
    except orjson.JSONDecodeError as error:
        raise UserError(f"features {path} is not JSON: {error}; write {{\"item\": [\"value\", …], …}}") from None
    if not isinstance(values, dict) or not values or not all(isinstance(row, list) for row in values.values()):
        raise UserError(f"features {path}: write {{\"item\": [\"value\", …], …}}, a list of values for each item")
    fields = len(next(iter(values.values())))
    wrong = next((item for item, row in values.items() if len(row) != fields), None)
    if wrong is not None:
        raise UserError(
            f"features {path}: item {wrong!r:.60} has {len(values[wrong])} values, those before it {fields}; give every item "
            "as many, null where it has none"
        )
    found = np.full((len(items), fields), -1, np.int32)
    for field in range(fields):
        known: dict[str, int] = {}
        for row, item in enumerate(items):
            value = values[item][field] if item in values else None
            if value is not None:
                found[row, field] = known.setdefault(str(value), len(known))
    return found
