"""A bundle from a checkpoint: weights beside the template's graph, the catalogue as it is now, checked against torch."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import orjson

from exporter import bundle
from exporter.bundle import GRAPH_FOLDER, Manifest, Snapshot
from exporter.steps import Report, silent, timed
from onerec.errors import UserError
from trainer.config import BeamConfig

if TYPE_CHECKING:
    from exporter.tracing import GraphPlan
    from serving_config.recommend.engine import Beams
    from trainer.checkpoint import Checkpoint
    from trainer.items import Catalogue
    from trainer.model import OneRec


class Export(msgspec.Struct, frozen=True, kw_only=True):
    """What a bundle is made from and for."""

    run_dir: Path
    state: Path | None = None
    checkpoint: Path | None = None
    width: int = BeamConfig().width
    threads: int = 2


class Expected(msgspec.Struct, frozen=True, kw_only=True):
    """A request with the answer that the new version must give."""

    history: list[str]
    sessions: list[list[str]]


def state_of_run(run_dir: Path) -> Path:
    """The state that a run was trained on, as its run.json says; UserError where there is no run."""
    try:
        return Path(orjson.loads((run_dir / "run.json").read_bytes())["state"])
    except OSError:
        raise UserError(
            f"{run_dir} is not a training run (no run.json); train first: onerec train --run {run_dir}"
        ) from None
    except (orjson.JSONDecodeError, KeyError, TypeError):
        raise UserError(f"{run_dir}/run.json is damaged; name the state by --state DIR") from None


def build_bundle(
    folder: Path,
    version: int,
    export: Export,
    templates: Path,
    *,
    now: Callable[[], float] = time.time,
    report: Report = silent,
) -> tuple[Manifest, Expected]:
    """Fill `folder` with a sealed bundle whose graph was checked against torch; also a request to try it with."""
    from exporter.onnx_graph import search_plan
    from exporter.optimise import CPU_TEMPLATE
    from exporter.parity import compare, parity_rows, torch_beams
    from exporter.weights import write_weights
    from serving_config.recommend.engine import CPU_GRAPH_FILE, Graph

    with timed(report, "checkpoint"):
        checkpoint, model = _load(export)
    with timed(report, "catalogue"):
        catalogue = _catalogue(export, checkpoint)
        snapshot = bundle.write_catalogue(folder, catalogue, checkpoint.model_config.codes)
        bundle.copy_runtime(folder)
    template = find_template(search_plan(checkpoint.model_config, export.width), templates, report=report)
    with timed(report, "weights"):
        write_weights(model.state_dict(), template, folder / GRAPH_FOLDER)
        bundle.link(template / CPU_TEMPLATE, folder / GRAPH_FOLDER / CPU_GRAPH_FILE)
    with timed(report, "parity"), ThreadPoolExecutor(1) as pool:
        rows = parity_rows(snapshot, checkpoint.model_config)
        histories = [snapshot.item_codes[row].astype(np.int64) for row in rows]
        reference = pool.submit(torch_beams, model, snapshot, histories, export.width)
        served = Graph(folder / GRAPH_FOLDER, snapshot.trie, threads=export.threads).search(histories)
        parity = compare(reference.result(), served)
    with timed(report, "seal"):
        manifest = Manifest(
            version=version,
            codebook_version=checkpoint.codebook_version,
            catalogue_revision=catalogue.revision,
            items=snapshot.trie.items,
            leaves=snapshot.trie.leaves,
            watermark=checkpoint.watermark,
            step=checkpoint.step,
            model_config=checkpoint.model_config,
            width=export.width,
            created_ms=int(now() * 1000),
            parity=parity,
            files=bundle.digest_files(folder),
        )
        bundle.write_manifest(folder, manifest)
    return manifest, _expected(snapshot, rows[-1], served)


def export_bundle(out_dir: Path, export: Export, *, report: Report = silent) -> dict[str, Any]:
    """Write a bundle into a new folder, without a repository; its version is 0. Returns its manifest's main fields."""
    with _new_folder(out_dir) as folder:
        manifest, _ = build_bundle(folder, 0, export, export.run_dir / "templates", report=report)
        bundle.sync_tree(folder)
    return {"step": manifest.step, "items": manifest.items, "watermark": manifest.watermark}


def export_plain_model(out_dir: Path, export: Export, *, report: Report = silent) -> dict[str, Any]:
    """Write a model for Triton's own ONNX Runtime backend into a new folder. Returns its main fields."""
    from exporter.onnx_graph import search_plan
    from exporter.plain import export_plain
    from exporter.trie import build_trie

    with _new_folder(out_dir) as folder:
        with timed(report, "checkpoint"):
            checkpoint, model = _load(export)
        with timed(report, "catalogue"):
            catalogue = _catalogue(export, checkpoint)
            trie = build_trie(catalogue.item_codes, checkpoint.model_config.codes)
        templates = export.run_dir / "templates"
        find_template(search_plan(checkpoint.model_config, export.width), templates, report=report)
        with timed(report, "plain"):
            export_plain(
                model.state_dict(),
                checkpoint.model_config,
                trie,
                catalogue.item_ids,
                folder,
                width=export.width,
                templates=templates,
                name=out_dir.resolve().name,
            )
            bundle.sync_tree(folder)
    return {"step": checkpoint.step, "items": trie.items, "watermark": checkpoint.watermark}


@contextmanager
def _new_folder(out_dir: Path) -> Iterator[Path]:
    """A folder beside `out_dir` that takes its name when the block ends well, and is removed when not."""
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise UserError(f"--out {out_dir} is there already; name a folder that is not")
    staging = out_dir.with_name(f".{out_dir.name}-{os.getpid()}")
    try:
        staging.mkdir(parents=True)
        yield staging
        staging.replace(out_dir)
    except OSError as error:
        raise UserError(f"--out {out_dir} cannot be written: {error.strerror} ({error.filename})") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def find_template(plan: GraphPlan, templates: Path, *, report: Report = silent) -> Path:
    """The template of a plan and its form for the CPU; traced where it is not there."""
    from exporter.optimise import CPU_TEMPLATE, ensure_cpu_graph
    from exporter.weights import ensure_template, template_key

    folder = templates / template_key(plan)
    if not (folder / CPU_TEMPLATE).exists():
        with timed(report, "template"):
            ensure_cpu_graph(ensure_template(plan, templates))
            bundle.sync_tree(folder)
    return folder


def _load(export: Export) -> tuple[Checkpoint, OneRec]:
    """The checkpoint and its model; a checkpoint pruned by the trainer meanwhile is replaced by the newest one."""
    from trainer.checkpoint import latest_checkpoint, load_checkpoint, load_model

    if export.checkpoint is not None:
        checkpoint = load_checkpoint(export.checkpoint)
        return checkpoint, load_model(checkpoint)
    checkpoint = latest_checkpoint(export.run_dir)
    try:
        return checkpoint, load_model(checkpoint)
    except OSError:
        checkpoint = latest_checkpoint(export.run_dir)
        return checkpoint, load_model(checkpoint)


def _catalogue(export: Export, checkpoint: Checkpoint) -> Catalogue:
    """The catalogue of the checkpoint's codebook with every item that arrived since."""
    from streaming.store import Reader
    from trainer.items import load_catalogue, refresh_catalogue

    state = export.state or state_of_run(export.run_dir)
    try:
        base = load_catalogue(state, checkpoint.codebook_version)
    except UserError:
        bundle.check_codebooks(checkpoint.codebook_version, load_catalogue(state).version)
        raise
    with Reader(state) as reader:
        catalogue = refresh_catalogue(state, reader, base)
    bundle.check_codebooks(checkpoint.codebook_version, catalogue.version)
    return catalogue


def _expected(snapshot: Snapshot, history: list[int], served: Beams) -> Expected:
    """The longest parity history and its best sessions, as item ids."""
    leaves = served.leaves[-1]
    best = leaves[leaves[:, 0] >= 0][:2]
    if not len(best):
        raise UserError(
            f"the catalogue of {snapshot.trie.items} items is too small for a session of {leaves.shape[1]}; add items"
        )
    return Expected(
        history=[snapshot.item_ids[row] for row in history],
        sessions=[[snapshot.item_ids[row] for row in rows] for rows in snapshot.trie.session_rows(best).tolist()],
    )
