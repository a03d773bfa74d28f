"""The catalogue: every item's semantic ID, the codebook they come from, and codes for items that arrive later.

Rows keep their order for ever: first the fitted items, the most watched first, then new ones as they arrive. That is
also the order of the items that share a tuple of codes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import orjson
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from onerec.config import Config
from onerec.errors import UserError
from trainer import catalogue_files as files
from trainer.behaviour import SKIPPED_WEIGHT, ItemSource
from trainer.code_files import load_codes
from trainer.item_vectors import ItemVectors, Space, make_vectors, to_unit
from trainer.semantic_ids import Codebook, codebook_of_codes, default_codes, fit, nearest_codes
from trainer.side_features import SideModel, features_of
from trainer.vectors import encode_text, load_vectors

log = logging.getLogger("onerec.catalogue")
COMMIT_SESSIONS = 10_000
"""Sessions read without finding a new item after which the journal notes how far they were read."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Catalogue:
    """Items and their codes; immutable, so that whoever holds one never sees it change.

    `version` names the codebook (centroids and fitted assignment), `revision` all of it, new items too.
    `levels` L; `codes` K, the codes a level may have; `item_codes` int32 [N, L]; `fitted` bool [N];
    `index`: row of an item. `centroids` float32 [L, K, d] and `used` bool [L, K] are None for codes made elsewhere
    without vectors; `errors` [L + 1] as in `Codebook`.
    """

    version: str
    revision: str
    levels: int
    codes: int
    item_ids: list[str]
    item_codes: NDArray[np.int32]
    fitted: NDArray[np.bool_]
    tags: list[list[str]]
    index: dict[str, int]
    method: str
    space: Space | None
    centroids: NDArray[np.float32] | None
    used: NDArray[np.bool_] | None
    side: SideModel | None
    errors: list[float] | None
    origins: dict[str, int]
    left_out: list[str]
    state_dir: Path
    last_item: int
    last_session: int
    journal_offset: int

    def codes_of(self, item_ids: Sequence[str]) -> NDArray[np.int32]:
        """Codes [n, L] of those of the items that are known, in their order."""
        rows = [row for row in map(self.index.get, item_ids) if row is not None]
        return self.item_codes[rows] if rows else np.empty((0, self.levels), np.int32)

    def vectors(self) -> NDArray[np.float32] | None:
        """Vectors [n, d] of the first n rows, those that a build saw; NaN where there is none. None without vectors."""
        _, data = files.read_version(self.state_dir, self.version)
        return files.read_array(data["vectors.npy"]) if "vectors.npy" in data else None


def load_catalogue(state_dir: Path, version: str | None = None) -> Catalogue:
    """The catalogue of a state: its current codebook, or that of `version`, with the new items written so far.

    Raises UserError where there is none, or it is foreign or corrupt; the text says how to get one.
    """
    version = version or files.current_version(state_dir)
    if version is None:
        raise UserError(f"state {state_dir} has no catalogue yet; build it: onerec items --state {state_dir}")
    manifest, data = files.read_version(state_dir, version)
    names = orjson.loads(data["items.json"])
    codes = files.read_array(data["codes.npy"])
    known = "centroids.npy" in data
    side = orjson.loads(data["side.json"]) if known else {}
    catalogue = Catalogue(
        version=version,
        revision=_first_revision(version, names["item_ids"][manifest.fitted:], codes[manifest.fitted:]),
        levels=manifest.levels,
        codes=manifest.codes,
        item_ids=names["item_ids"],
        item_codes=_frozen(codes),
        fitted=_frozen(np.arange(manifest.items) < manifest.fitted),
        tags=names["tags"],
        index={item_id: row for row, item_id in enumerate(names["item_ids"])},
        method=manifest.method,
        space=cast(Space, manifest.space) if known else None,
        centroids=_frozen(files.read_array(data["centroids.npy"])) if known else None,
        used=_frozen(files.read_array(data["used.npy"])) if known else None,
        side=SideModel(vocabulary=side, weights=files.read_array(data["side.npy"])) if known else None,
        errors=manifest.errors,
        origins=manifest.origins,
        left_out=manifest.left_out,
        state_dir=Path(state_dir),
        last_item=manifest.last_item,
        last_session=manifest.last_session,
        journal_offset=0,
    )
    return _caught_up(catalogue)


def refresh_catalogue(state_dir: Path, reader: ItemSource, base: Catalogue | None = None) -> Catalogue:
    """The catalogue with codes for the items that arrived since; the codebook and its version stay.

    Costs what is new: with `base`, a catalogue of this state that the caller holds, nothing else is read again.
    An item's first usable entry decides its codes (embedding of the codebook's dimension, else side features); one
    known only from behaviour gets the mean of the fitted items around it in the first session that has any. Codes
    once given are written down, so that every process and every later call has the same.
    """
    catalogue = _caught_up(base) if base is not None else load_catalogue(state_dir)
    if not _anything_new(catalogue, reader):
        return catalogue
    with files.journal_lock(state_dir, catalogue.version) as writable:
        catalogue = _caught_up(catalogue)
        entries, last_item, last_session = _newcomers(catalogue, reader)
        if not entries and last_session - catalogue.last_session < COMMIT_SESSIONS:
            return dataclasses.replace(catalogue, last_item=last_item, last_session=last_session)
        entries.append({"commit": _chained(catalogue.revision, entries), "items": last_item, "sessions": last_session})
        offset = catalogue.journal_offset
        if writable:
            offset = files.append_journal(state_dir, catalogue.version, entries, offset)
        return _extended(catalogue, entries, offset)


def build_catalogue(
    state_dir: Path, reader: ItemSource, config: Config, *, vectors: Path | None = None,
    codes_file: Path | None = None, text_column: str | None = None, until: int | None = None,
    progress: Callable[[str], None] = lambda step: None,
) -> Catalogue:
    """Give every item vectors and semantic IDs, write them as a new version and make it current.

    `vectors`: a file of item vectors (with `text_column`: of texts to encode); `codes_file`: semantic IDs made
    elsewhere, kept as they are; `until` (ms): nothing after this event time is looked at, and items that appear later
    come in as new ones. Same state, files, settings and seed: same version. Raises UserError or Failure before
    anything is changed.
    """
    settings = config.catalogue
    table = load_codes(codes_file, settings.codes) if codes_file else None
    if text_column is not None and vectors is None:
        raise UserError("--text-column names a column of the file given with --vectors; add --vectors TABLE")
    given = None
    if vectors is not None:
        progress(f"reading {vectors}")
        given = (encode_text(vectors, text_column, model=settings.text_model) if text_column
                 else load_vectors(vectors))
    with threadpool_limits(limits=1):
        try:
            made = make_vectors(reader, settings, given=given, until=until, progress=progress)
        except UserError:
            if table is None or given is not None or _has_items(reader):
                raise
            made = None
        if table is None:
            assert made is not None
            codes = settings.codes or default_codes(len(made.item_ids))
            codebook = fit(
                made.vectors, levels=settings.levels, codes=codes, method=settings.method,
                iterations=settings.iterations, rng=np.random.default_rng(settings.seed),
                progress=lambda level: progress(f"level {level + 1} of {settings.levels} is done"))
            contents = _Contents(made.item_ids, codebook.codes, len(made.item_ids), codebook, made, settings.method)
        else:
            codes = settings.codes or int(table.codes_NL.max()) + 1
            contents = _with_codes(table.item_ids, table.codes_NL, codes, made)
    if contents.left_out:
        log.warning("%d items have neither vector, side features nor behaviour and are left out: %s; send them again "
                    "with tags, author or embedding, or name their vectors with --vectors",
                    len(contents.left_out), _some(contents.left_out))
    _write(Path(state_dir), contents, codes, until)
    progress("codes for items that came since")
    return refresh_catalogue(state_dir, reader)


@dataclasses.dataclass(frozen=True, slots=True)
class _Contents:
    """What a version will hold; the first `fitted` rows are the codebook's own."""

    item_ids: list[str]
    codes_NL: NDArray[np.int32]
    fitted: int
    codebook: Codebook | None
    made: ItemVectors | None
    method: str

    @property
    def left_out(self) -> list[str]:
        held = set(self.item_ids)
        return [item for item in self.made.left_out if item not in held] if self.made else []


def _with_codes(
    item_ids: list[str], codes_NL: NDArray[np.int32], codes: int, made: ItemVectors | None
) -> _Contents:
    """Codes from elsewhere; with vectors the centroids they imply, and from these codes for all other items."""
    row_of = {item_id: row for row, item_id in enumerate(made.item_ids)} if made else {}
    both = [row for row, item_id in enumerate(item_ids) if item_id in row_of]
    if made is None or not both:
        return _Contents(item_ids, codes_NL, len(item_ids), None, None, "loaded")
    own = codebook_of_codes(made.vectors[[row_of[item_ids[row]] for row in both]], codes_NL[both], codes)
    held = set(item_ids)
    others = [item_id for item_id in made.item_ids if item_id not in held]
    if others:
        more = nearest_codes(made.vectors[[row_of[item] for item in others]], own.centroids, own.used)
        codes_NL = np.concatenate([codes_NL, more])
    return _Contents(item_ids + others, codes_NL, len(item_ids), own, made, "loaded")


def _write(state_dir: Path, contents: _Contents, codes: int, until: int | None) -> None:
    made, codebook = contents.made, contents.codebook
    tags_of = dict(zip(made.item_ids, made.tags, strict=True)) if made else {}
    data = {
        "items.json": orjson.dumps({"item_ids": contents.item_ids,
                                    "tags": [tags_of.get(item_id, []) for item_id in contents.item_ids]}),
        "codes.npy": files.array_bytes(contents.codes_NL),
    }
    if made is not None and codebook is not None:
        data["centroids.npy"] = files.array_bytes(codebook.centroids)
        data["used.npy"] = files.array_bytes(codebook.used)
        data["vectors.npy"] = files.array_bytes(_vectors_by_row(contents.item_ids, made))
        data["side.json"] = orjson.dumps(made.side.vocabulary)
        data["side.npy"] = files.array_bytes(made.side.weights)
    fingerprint = hashlib.sha256(f"{files.FORMAT_VERSION} {codes}".encode())
    fingerprint.update(data.get("centroids.npy", b""))
    fingerprint.update(files.array_bytes(contents.codes_NL[: contents.fitted]))
    fingerprint.update(orjson.dumps(contents.item_ids[: contents.fitted]))
    files.write_version(state_dir, files.Manifest(
        format=files.FORMAT,
        format_version=files.FORMAT_VERSION,
        version=fingerprint.hexdigest()[:16],
        levels=contents.codes_NL.shape[1],
        codes=codes,
        items=len(contents.item_ids),
        fitted=contents.fitted,
        method=contents.method,
        space=made.space if made else "none",
        dimension=made.vectors.shape[1] if made else None,
        errors=codebook.errors if codebook else None,
        origins=made.origins if made else {},
        left_out=contents.left_out,
        last_item=made.last_item if made and until is None else 0,
        last_session=made.last_session if made and until is None else 0,
        until=until,
        files={},
    ), data)


def _vectors_by_row(item_ids: list[str], made: ItemVectors) -> NDArray[np.float32]:
    rows = {item_id: row for row, item_id in enumerate(made.item_ids)}
    vectors = np.full((len(item_ids), made.vectors.shape[1]), np.nan, np.float32)
    for row, item_id in enumerate(item_ids):
        if item_id in rows:
            vectors[row] = made.vectors[rows[item_id]]
    return vectors


def _has_items(reader: ItemSource) -> bool:
    return next(iter(reader.items(after=0)), None) is not None or next(iter(reader.sessions(after=0)), None) is not None


def _anything_new(catalogue: Catalogue, reader: ItemSource) -> bool:
    return (next(iter(reader.items(after=catalogue.last_item)), None) is not None
            or next(iter(reader.sessions(after=catalogue.last_session)), None) is not None)


def _newcomers(catalogue: Catalogue, reader: ItemSource) -> tuple[list[dict[str, Any]], int, int]:
    """Journal entries for what the state holds beyond the catalogue: records first, then behaviour."""
    entries: dict[str, dict[str, Any]] = {}
    retagged: dict[str, dict[str, Any]] = {}
    unusable: list[str] = []
    last_item, last_session = catalogue.last_item, catalogue.last_session
    for sequence, record in reader.items(after=catalogue.last_item):
        last_item = sequence
        row, tags = catalogue.index.get(record.item_id), list(record.tags)
        if row is not None:
            if tags != catalogue.tags[row] or record.item_id in retagged:
                retagged[record.item_id] = {"tags_of": record.item_id, "tags": tags}
        elif record.item_id in entries:
            entries[record.item_id]["tags"] = tags
        elif (vector := _vector_of(catalogue, record)) is not None:
            entries[record.item_id] = _entry(catalogue, record.item_id, vector, tags)
        else:
            unusable.append(record.item_id)
    behaviour = _BehaviourVectors(catalogue)
    for sequence, session in reader.sessions(after=catalogue.last_session):
        last_session = sequence
        for item_id in behaviour.strangers(session):
            if item_id not in entries and (vector := behaviour.around(session)) is not None:
                entries[item_id] = _entry(catalogue, item_id, vector, [])
    unusable = [item_id for item_id in dict.fromkeys(unusable) if item_id not in entries]
    if unusable:
        log.warning("%d new items have no usable vector, side features or behaviour and are left out for now: %s; "
                    "send them again with tags, author or embedding", len(unusable), _some(unusable))
    return [*entries.values(), *retagged.values()], last_item, last_session


def _vector_of(catalogue: Catalogue, record: Any) -> NDArray[np.float32] | None:
    """A new item's vector in the codebook's space, from its embedding or its side features; None if it has neither."""
    if catalogue.centroids is None or catalogue.side is None:
        return None
    if record.embedding is not None and catalogue.space != "learnt":
        vector = np.asarray(record.embedding, np.float32)
        if vector.shape == catalogue.centroids.shape[2:] and np.isfinite(vector).all():
            return vector
    names = features_of(record.tags, record.author_id, record.duration_ms)
    if not names:
        return None
    vector = catalogue.side.vector(names)
    return to_unit(vector) if catalogue.space == "learnt" else vector


class _BehaviourVectors:
    """Vectors for items that only sessions know, from the fitted items around them; reads the vectors when needed."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        self._vectors: NDArray[np.float32] | None = None

    def strangers(self, session: Any) -> Iterator[str]:
        """Items of a session that the catalogue does not know, each once."""
        index = self._catalogue.index
        return iter(dict.fromkeys(item.item_id for item in session.items if item.item_id not in index))

    def around(self, session: Any) -> NDArray[np.float32] | None:
        """Mean vector [d] of the fitted items in a session and its history; None if there is none."""
        catalogue = self._catalogue
        if catalogue.centroids is None:
            return None
        if self._vectors is None:
            self._vectors = catalogue.vectors()
            assert self._vectors is not None
        weights = {item_id: 1.0 for item_id in session.history}
        for item in session.items:
            weight = 1.0 if item.effective or item.interactions else SKIPPED_WEIGHT
            weights[item.item_id] = max(weight, weights.get(item.item_id, 0.0))
        total, mass = np.zeros(catalogue.centroids.shape[2]), 0.0
        for item_id, weight in weights.items():
            row = catalogue.index.get(item_id)
            if row is not None and catalogue.fitted[row] and np.isfinite(self._vectors[row, 0]):
                total += weight * self._vectors[row]
                mass += weight
        if not mass:
            return None
        mean = (total / mass).astype(np.float32)
        return to_unit(mean) if catalogue.space == "learnt" else mean


def _entry(catalogue: Catalogue, item_id: str, vector: NDArray[np.float32], tags: list[str]) -> dict[str, Any]:
    assert catalogue.centroids is not None and catalogue.used is not None
    codes = nearest_codes(vector[None], catalogue.centroids, catalogue.used)[0]
    return {"item_id": item_id, "codes": codes.tolist(), "tags": tags}


def _caught_up(catalogue: Catalogue) -> Catalogue:
    """With what other processes have written to the journal since."""
    entries, offset = files.read_journal(catalogue.state_dir, catalogue.version, catalogue.journal_offset)
    return _extended(catalogue, entries, offset) if entries else catalogue


def _extended(catalogue: Catalogue, entries: list[dict[str, Any]], offset: int) -> Catalogue:
    """A catalogue with committed journal entries applied."""
    item_ids, tags, index = list(catalogue.item_ids), list(catalogue.tags), dict(catalogue.index)
    left_out = set(catalogue.left_out)
    codes: list[list[int]] = []
    block: list[dict[str, Any]] = []
    revision, last_item, last_session = catalogue.revision, catalogue.last_item, catalogue.last_session
    for entry in entries:
        if "commit" in entry:
            revision = _chained(revision, block)
            last_item, last_session = max(last_item, entry["items"]), max(last_session, entry["sessions"])
            if revision != entry["commit"]:
                path = files.folder_of(catalogue.state_dir) / catalogue.version / files.JOURNAL
                raise UserError(f"{path} is corrupt; delete it, and new items get their codes again")
            block = []
            continue
        block.append(entry)
        if "tags_of" in entry:
            tags[index[entry["tags_of"]]] = entry["tags"]
            continue
        index[entry["item_id"]] = len(item_ids)
        item_ids.append(entry["item_id"])
        tags.append(entry["tags"])
        codes.append(entry["codes"])
        left_out.discard(entry["item_id"])
    item_codes, fitted = catalogue.item_codes, catalogue.fitted
    if codes:
        item_codes = _frozen(np.concatenate([item_codes, np.array(codes, np.int32)]))
        fitted = _frozen(np.concatenate([fitted, np.zeros(len(codes), bool)]))
    return dataclasses.replace(
        catalogue, revision=revision, item_ids=item_ids, item_codes=item_codes, fitted=fitted, tags=tags, index=index,
        left_out=[item_id for item_id in catalogue.left_out if item_id in left_out], last_item=last_item,
        last_session=last_session, journal_offset=offset)


def _first_revision(version: str, item_ids: list[str], codes_nL: NDArray[np.int32]) -> str:
    return _chained(version, [{"item_id": item_id, "codes": codes.tolist()}
                              for item_id, codes in zip(item_ids, codes_nL, strict=True)])


def _chained(revision: str, entries: list[dict[str, Any]]) -> str:
    """The hash that follows `revision`, entry by entry, so that it does not depend on how they were grouped."""
    for entry in entries:
        revision = hashlib.sha256(revision.encode() + orjson.dumps(entry)).hexdigest()[:16]
    return revision


def _frozen(array: NDArray[Any]) -> NDArray[Any]:
    array.setflags(write=False)
    return array


def _some(item_ids: list[str]) -> str:
    return ", ".join(item_ids[:5]) + (", …" if len(item_ids) > 5 else "")
