"""A bundle: graph, weights, trie, item map, runtime and manifest under one version number, sealed by sha256.

Layout of a version folder, which is also what Triton's Python backend loads:

    model.py            entry of the Python backend        lib/         the modules it needs, copied
    graph/              ONNX graph and its weights         catalogue.npz  trie, item ids, codes: one snapshot
    reward/             the reward model likewise, if any  tags.json      tags by catalogue row
    manifest.json       this, with sha256 and size of every file

No torch in here: the serving host imports this module too.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from exporter.trie import Trie, build_trie
from onerec.errors import Failure, UserError
from onerec.files import sha256_of, sync_path
from trainer.config import ModelConfig, RewardConfig, RewardModelConfig

FORMAT = 3
READABLE = (1, 2, 3)
"""A version is served by its own copy of the modules, so older ones serve on: 1 knows no reward model, 2 no lineage."""
MANIFEST_FILE = "manifest.json"
CATALOGUE_FILE = "catalogue.npz"
TAGS_FILE = "tags.json"
GRAPH_FOLDER = "graph"
REWARD_FOLDER = "reward"
LIBRARY_FOLDER = "lib"
ENTRY_FILE = "model.py"

RUNTIME_MODULES = ("serving_config.recommend.service", "serving_config.recommend.histories")
PROJECT_PACKAGES = ("onerec", "streaming", "trainer", "exporter", "serving_config")


class CatalogueLike(Protocol):
    """What a bundle takes from `trainer.items.Catalogue`."""

    @property
    def version(self) -> str:
        """Codebook version."""
    @property
    def revision(self) -> str:
        """Hash of everything, new items included."""
    @property
    def item_ids(self) -> list[str]:
        """Item ids by row."""
    @property
    def item_codes(self) -> NDArray[np.int32]:
        """Codes [N, L]."""
    @property
    def tags(self) -> list[list[str]]:
        """Tags by row."""


class FileEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One file as it was when the bundle was sealed."""

    sha256: str
    size: int


class Parity(msgspec.Struct, frozen=True, kw_only=True):
    """The graph against torch on the same weights: histories asked, sessions compared, largest score difference."""

    histories: int
    sessions: int
    score_difference: float


class RewardParity(msgspec.Struct, frozen=True, kw_only=True):
    """The reward graph against torch: sessions scored for each of `histories`, largest difference of a reward."""

    histories: int
    sessions: int
    difference: float


class RewardPart(msgspec.Struct, frozen=True, kw_only=True):
    """The reward model of a bundle: its architecture, how its towers become one reward, and its check against torch."""

    config: RewardModelConfig
    weights: RewardConfig
    parity: RewardParity


class GateScores(msgspec.Struct, frozen=True, kw_only=True):
    """What the release gate found. Losses are nats a code, mean over `windows` of the newest `sessions`, of which neither
    version has learnt `unseen`; None where there was nothing to score. `answers` were checked, `latency_ms` is their median.
    """

    candidate: float | None = None
    served: float | None = None
    served_version: int | None = None
    sessions: int = 0
    windows: int = 0
    unseen: int = 0
    answers: int = 0
    latency_ms: float | None = None
    passed: bool = True


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a bundle says of itself. `watermark` is event time in ms learnt up to, None before the first session;
    `items` and `leaves` count the catalogue and its distinct tuples; `created_ms` is wall-clock time; `parity` is None in
    a candidate that failed it; `reward` is None in a version without a reward model.

    Lineage, None where not known: last session (`sequence`) learnt and last item record (`item_sequence`) known of the
    state, positions of the log then (`source`: name → position), time of the checkpoint, hash of the run's configuration,
    code that trained (`code_version`) and code that exported, the version `before`, when these weights first became a
    version (`brought_ms`, where that was another one), the gate's scores; why it was promoted (`reason`), from which one.
    """

    version: int
    codebook_version: str
    catalogue_revision: str
    items: int
    leaves: int
    watermark: int | None
    step: int
    model_config: ModelConfig
    width: int
    created_ms: int
    parity: Parity | None
    files: dict[str, FileEntry]
    reward: RewardPart | None = None
    sequence: int | None = None
    item_sequence: int | None = None
    checkpoint_created_ms: int | None = None
    source: dict[str, Any] | None = None
    config_sha256: str | None = None
    code_version: str | None = None
    exported_by: str | None = None
    before: int | None = None
    brought_ms: int | None = None
    gate: GateScores | None = None
    reason: str | None = None
    promoted_from: int | None = None
    format: int = FORMAT

    @property
    def weights_ms(self) -> int:
        """When the first version with these weights was made, wall clock."""
        return self.brought_ms or self.created_ms

    @property
    def weights(self) -> str:
        """Name of graph and weights together: equal in versions that differ in their catalogue only."""
        parts = [(name, entry.sha256) for name, entry in sorted(self.files.items())
                 if name.startswith((f"{GRAPH_FOLDER}/", f"{REWARD_FOLDER}/"))]  # fmt: skip
        return hashlib.sha256(msgspec.json.encode(parts)).hexdigest()


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """The catalogue of one version: never changed, so that trie and item map cannot disagree within a request."""

    codebook_version: str
    revision: str
    trie: Trie
    item_ids: list[str]
    item_codes: NDArray[np.int32]


def write_catalogue(folder: Path, catalogue: CatalogueLike, codes: int) -> Snapshot:
    """Write trie, item map and tags of a catalogue into a bundle folder.

    `codes` is the model's number of codes a level; raises UserError where the catalogue does not fit it.
    """
    trie = build_trie(catalogue.item_codes, codes)
    encoded = [item_id.encode() for item_id in catalogue.item_ids]
    offsets = np.zeros(len(encoded) + 1, dtype=np.int64)
    np.cumsum([len(item_id) for item_id in encoded], out=offsets[1:])
    arrays: dict[str, NDArray[np.generic]] = {
        "codebook_version": np.array(catalogue.version),
        "revision": np.array(catalogue.revision),
        "codes": np.array(codes),
        "ids": np.frombuffer(b"".join(encoded), dtype=np.uint8),
        "id_offsets": offsets,
        "item_codes": np.ascontiguousarray(catalogue.item_codes, dtype=np.int32),
        "tuples": trie.tuples,
        "leaf_pointers": trie.leaf_pointers,
        "leaf_rows": trie.leaf_rows,
    }
    for level in range(trie.levels):
        arrays |= {
            f"pointers{level}": trie.pointers[level],
            f"tokens{level}": trie.tokens[level],
            f"capacity{level}": trie.capacity[level],
            f"ancestor{level}": trie.ancestor[level],
        }
    with (folder / CATALOGUE_FILE).open("wb") as file:
        np.savez(file, **arrays)
    (folder / TAGS_FILE).write_bytes(msgspec.json.encode(catalogue.tags))
    return Snapshot(
        codebook_version=catalogue.version,
        revision=catalogue.revision,
        trie=trie,
        item_ids=list(catalogue.item_ids),
        item_codes=catalogue.item_codes,
    )


def read_catalogue(folder: Path) -> Snapshot:
    """The catalogue snapshot of a bundle; raises UserError naming the file when it cannot be read."""
    try:
        with np.load(folder / CATALOGUE_FILE, allow_pickle=False) as arrays:
            levels = arrays["tuples"].shape[1]
            blob, offsets = arrays["ids"].tobytes(), arrays["id_offsets"].tolist()
            trie = Trie(
                levels=levels,
                codes=int(arrays["codes"]),
                tuples=arrays["tuples"],
                pointers=tuple(arrays[f"pointers{level}"] for level in range(levels)),
                tokens=tuple(arrays[f"tokens{level}"] for level in range(levels)),
                capacity=tuple(arrays[f"capacity{level}"] for level in range(levels)),
                ancestor=tuple(arrays[f"ancestor{level}"] for level in range(levels)),
                leaf_pointers=arrays["leaf_pointers"],
                leaf_rows=arrays["leaf_rows"],
            )
            return Snapshot(
                codebook_version=str(arrays["codebook_version"]),
                revision=str(arrays["revision"]),
                trie=trie,
                item_ids=[blob[a:b].decode() for a, b in zip(offsets, offsets[1:], strict=False)],
                item_codes=arrays["item_codes"],
            )
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise UserError(f"bundle {folder}: {CATALOGUE_FILE} cannot be read ({error}); publish again") from None


def read_tags(folder: Path) -> list[list[str]]:
    """Tags by catalogue row."""
    try:
        return msgspec.json.decode((folder / TAGS_FILE).read_bytes(), type=list[list[str]])
    except (OSError, msgspec.DecodeError) as error:
        raise UserError(f"bundle {folder}: {TAGS_FILE} cannot be read ({error}); publish again") from None


def _source(module: str) -> Path | None:
    """File of a module of this project, None for what is not a module (a name imported from one)."""
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        return None
    return Path(spec.origin) if spec and spec.origin else None


def source_file(module: str) -> Path:
    """File of a module of this project; Failure where the installation lacks it."""
    source = _source(module)
    if source is None:
        raise Failure(f"{module} is not installed; install the package again: pip install .")
    return source


def imported(source: Path) -> set[str]:
    """Dotted names that a file imports at its top level or in functions; type-checking blocks left out."""
    names: set[str] = set()
    pending: list[ast.AST] = [ast.parse(source.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            for block in ("body", "orelse", "handlers", "finalbody"):
                pending.extend(getattr(node, block, None) or [])
    return names


def runtime_modules() -> dict[str, Path]:
    """The modules that serve, and every module of this project that they import, in turn: name → file."""
    found: dict[str, Path] = {}
    pending = list(RUNTIME_MODULES)
    while pending:
        name = pending.pop()
        if name in found or name.split(".")[0] not in PROJECT_PACKAGES:
            continue
        source = _source(name)
        if source is None:
            continue
        found[name] = source
        pending.extend(imported(source))
        if "." in name:
            pending.append(name.rpartition(".")[0])
    return found


@functools.cache
def _runtime_files() -> dict[str, Path]:
    """Relative name in a bundle → source, of the entry and of the modules that it needs. Found once a process."""
    files = {ENTRY_FILE: source_file("serving_config.recommend").parent / "model.py"}
    for name, source in runtime_modules().items():
        parts = name.split(".")
        relative = Path(*parts, "__init__.py") if source.name == "__init__.py" else Path(*parts).with_suffix(".py")
        files[f"{LIBRARY_FOLDER}/{relative.as_posix()}"] = source
    return files


def copy_runtime(folder: Path) -> None:
    """Lay the Python backend's entry and the modules it needs into a bundle: it depends on no installed copy of them."""
    for relative, source in _runtime_files().items():
        target = folder / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    # A file where Python would put bytecode of the entry: a folder made there later would change the version's time
    # stamp, and Triton would load the version anew at the next publish.
    (folder / "__pycache__").touch()


def link(source: Path, target: Path) -> None:
    """A second name for a file that is never written again; a copy where the file system has no such thing."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def link_sealed(base: Path, manifest: Manifest, folder: Path) -> dict[str, FileEntry]:
    """Give `folder` graph and weights of the sealed bundle `base` as second names of its files, and the modules of now.

    Returns the digests of the linked files, which are not read again.
    """
    linked = {}
    for name, entry in manifest.files.items():
        if name.startswith((f"{GRAPH_FOLDER}/", f"{REWARD_FOLDER}/")):
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            link(base / name, target)
            linked[name] = entry
    copy_runtime(folder)
    return linked


def _digest(path: Path) -> FileEntry:
    return FileEntry(sha256=sha256_of(path), size=path.stat().st_size)


def bundle_files(folder: Path) -> list[str]:
    """Relative names of the files in a bundle, manifest left out."""
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path.name != MANIFEST_FILE and "__pycache__" not in path.parts
    )


def digest_files(folder: Path, known: Mapping[str, FileEntry] | None = None) -> dict[str, FileEntry]:
    """sha256 and size of every file of a bundle; those of `known` are taken from there."""
    known = known or {}
    return {name: known.get(name) or _digest(folder / name) for name in bundle_files(folder)}


def sync_tree(folder: Path) -> None:
    """Force every file and folder below `folder`, and itself, to the disk."""
    for path in [*folder.rglob("*"), folder]:
        sync_path(path)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Seal a bundle: the manifest with its own digest as the last field."""
    record = msgspec.to_builtins(manifest)
    record["sha256"] = _record_digest(record)
    (folder / MANIFEST_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(record)) + b"\n")


def _record_digest(record: dict[str, object]) -> str:
    return hashlib.sha256(msgspec.json.encode(record, order="deterministic")).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a bundle, its own digest checked; raises UserError naming folder and fault."""
    try:
        record = msgspec.json.decode((folder / MANIFEST_FILE).read_bytes(), type=dict[str, object])
        if (found := record.get("format")) not in READABLE:
            raise UserError(f"bundle {folder}: format {found}, this version reads {READABLE}; publish again")
        digest = record.pop("sha256", None)
        if digest != _record_digest(record):
            raise UserError(f"bundle {folder}: {MANIFEST_FILE} is damaged; publish again")
        return msgspec.convert(record, Manifest)
    except OSError as error:
        raise UserError(f"bundle {folder}: {MANIFEST_FILE} cannot be read ({error.strerror}); publish again") from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise UserError(f"bundle {folder}: {MANIFEST_FILE} is damaged ({error}); publish again") from None


def verify_bundle(folder: Path) -> Manifest:
    """Recompute every hash of a bundle and check that its parts belong together; returns its manifest.

    Raises UserError naming the first file that is missing, altered or of another codebook.
    """
    manifest = read_manifest(folder)
    for name, entry in manifest.files.items():
        try:
            found = _digest(folder / name)
        except OSError as error:
            raise UserError(f"bundle {folder}: {name} cannot be read ({error.strerror}); publish again") from None
        if found != entry:
            raise UserError(f"bundle {folder}: {name} is not what was published (sha256 differs); publish again")
    for name in (ENTRY_FILE, CATALOGUE_FILE, TAGS_FILE):
        if name not in manifest.files:
            raise UserError(f"bundle {folder}: no {name}; publish again")
    return manifest


def check_reward(reward: RewardModelConfig, model: ModelConfig) -> None:
    """Refuse a reward model that reads other codes or sessions than the generator writes."""
    read = (reward.levels, reward.codes, reward.session_items)
    written = (model.levels, model.codes, model.session_items)
    if read != written:
        raise UserError(
            "mixed versions: the reward model reads {} levels of {} codes and sessions of {}, ".format(*read)
            + "the generator writes {} levels of {} codes and sessions of {}; ".format(*written)
            + "train a run that holds both"
        )


def check_codebooks(weights: str, catalogue: str) -> None:
    """Refuse weights of one codebook with the catalogue of another: their codes mean different items."""
    if weights != catalogue:
        raise UserError(
            f"mixed versions: the checkpoint was trained with codebook {weights}, the catalogue has {catalogue}; "
            "train a run on this catalogue, or name the state whose catalogue the run was trained on"
        )
