"""A bundle from a checkpoint: weights beside the template's graph, the catalogue as it is now, checked against torch."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import numpy as np
import orjson
from numpy.typing import NDArray

from exporter import bundle
from exporter.bundle import GRAPH_FOLDER, REWARD_FOLDER, Manifest, RewardPart, Snapshot
from exporter.release import HeldBack
from exporter.steps import Report, silent, timed
from onerec.errors import UserError
from onerec.versions import code_version
from trainer.config import BeamConfig, ModelConfig, RewardConfig, RewardModelConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from exporter.tracing import GraphPlan
    from serving_config.recommend.engine import Beams, Graph
    from trainer.checkpoint import Checkpoint
    from trainer.items import Catalogue
    from trainer.model import OneRec
    from trainer.reward import RewardModel


class Export(msgspec.Struct, frozen=True, kw_only=True):
    """What a bundle is made from and for."""

    run_dir: Path
    state: Path | None = None
    checkpoint: Path | None = None
    width: int = BeamConfig().width
    threads: int = 2
    reward: RewardConfig = RewardConfig()


class Expected(msgspec.Struct, frozen=True, kw_only=True):
    """A request with the answers that the new version may give: the two best sessions, where two may be as good.

    `by_reward`: the same where the reward model chooses; empty in a version without one.
    """

    history: list[str]
    sessions: list[list[str]]
    by_reward: list[list[str]] = []


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


class Built(NamedTuple):
    """A sealed bundle, a request to try it with, and what was opened for it."""

    manifest: Manifest
    expected: Expected
    snapshot: Snapshot
    graph: Graph


Catalogues = Callable[["Checkpoint"], "Catalogue"]
"""The newest catalogue of a checkpoint's codebook."""


def build_bundle(
    folder: Path,
    version: int,
    export: Export,
    templates: Path,
    *,
    catalogue_of: Catalogues | None = None,
    now: Callable[[], float] = time.time,
    report: Report = silent,
) -> Built:
    """Fill `folder` with a sealed bundle whose graph was checked against torch; also a request to try it with.

    `catalogue_of`: where the caller keeps the catalogue; None reads it from the state. Raises HeldBack, the bundle sealed,
    for weights that are not finite and for a graph that does not answer as torch.
    """
    from exporter.onnx_graph import search_plan
    from exporter.parity import ParityFault, compare, parity_rows, torch_beams
    from exporter.reward_graph import reward_plan, served_weights
    from serving_config.recommend.engine import Graph

    with timed(report, "checkpoint"):
        checkpoint, model, reward_model = _load(export)
        if reward_model is not None:
            bundle.check_reward(reward_model.config, checkpoint.model_config)
    with timed(report, "catalogue"):
        catalogue = catalogue_of(checkpoint) if catalogue_of else _catalogue(export, checkpoint)
        snapshot = bundle.write_catalogue(folder, catalogue, checkpoint.model_config.codes)
        bundle.copy_runtime(folder)
    plan = search_plan(checkpoint.model_config, export.width)
    _write_graph(plan, model.state_dict(), folder / GRAPH_FOLDER, templates, report)
    if reward_model is not None:
        plan = reward_plan(reward_model.config)
        _write_graph(plan, served_weights(reward_model), folder / REWARD_FOLDER, templates, report, name="reward ")
    parity = reward = None
    fault = _not_finite(model, reward_model)
    if fault is None:
        with timed(report, "parity"), ThreadPoolExecutor(1) as pool:
            rows = parity_rows(snapshot, checkpoint.model_config)
            histories = [snapshot.item_codes[row].astype(np.int64) for row in rows]
            reference = pool.submit(torch_beams, model, snapshot, histories, export.width)
            graph = Graph(folder / GRAPH_FOLDER, snapshot.trie, threads=export.threads)
            served = graph.search(histories)
            try:
                parity = compare(reference.result(), served)
                expected = _expected(snapshot, rows[-1], served)
                if reward_model is not None:
                    reward, expected = _check_rewards(
                        reward_model, folder, export, snapshot, histories[-1], served, expected)
            except ParityFault as error:
                fault = str(error)
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
            parity=None if fault else parity,
            files=bundle.digest_files(folder),
            reward=reward,
            sequence=checkpoint.cursor.sequence,
            item_sequence=catalogue.last_item,
            checkpoint_created_ms=checkpoint.created_ms,
            source=checkpoint.source or None,
            config_sha256=checkpoint.config_sha256,
            code_version=checkpoint.code_version,
            exported_by=code_version(),
        )
        bundle.write_manifest(folder, manifest)
    if fault:
        raise HeldBack(fault, manifest)
    return Built(manifest, expected, snapshot, graph)


def _not_finite(*models: torch.nn.Module | None) -> str | None:
    """Says how many tensors of the models hold NaN or infinity; None where none does."""
    import torch

    tensors = {name: tensor for model in models if model is not None for name, tensor in model.state_dict().items()}
    bad = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    return f"weights are not finite: {len(bad)} of {len(tensors)} tensors, {bad[0]} first" if bad else None


def _write_graph(
    plan: GraphPlan, weights: Mapping[str, Tensor], folder: Path, templates: Path, report: Report, *, name: str = ""
) -> None:
    """The graph of a plan, its form for the CPU and these weights, in `folder`; `name` stands before its steps'."""
    from exporter.optimise import CPU_TEMPLATE
    from exporter.weights import write_weights
    from serving_config.recommend.graphs import CPU_GRAPH_FILE

    template = find_template(plan, templates, report=report, name=name)
    with timed(report, f"{name}weights"):
        write_weights(weights, template, folder)
        bundle.link(template / CPU_TEMPLATE, folder / CPU_GRAPH_FILE)


def _check_rewards(
    model: RewardModel,
    folder: Path,
    export: Export,
    snapshot: Snapshot,
    history: NDArray[np.int64],
    served: Beams,
    expected: Expected,
) -> tuple[RewardPart, Expected]:
    """The reward graph against torch on all beams of a history, and again for the empty one; what `reward` must choose."""
    from exporter.parity import compare_rewards, torch_rewards
    from serving_config.recommend.rewards import RewardGraph, best_by_reward

    leaves = served.leaves[-1]
    leaves = leaves[leaves[:, 0] >= 0]
    histories = [history, history[:0]]
    sessions = np.stack([snapshot.trie.tuples[leaves]] * len(histories)).astype(np.int64)
    rewards = RewardGraph(folder / REWARD_FOLDER, model.config, threads=export.threads).rewards(histories, sessions)
    parity = compare_rewards(torch_rewards(model, histories, sessions), rewards)
    best = leaves[best_by_reward(rewards[0], export.reward, 2)]
    part = RewardPart(config=model.config, weights=export.reward, parity=parity)
    return part, msgspec.structs.replace(expected, by_reward=_item_ids(snapshot, best))


def export_bundle(out_dir: Path, export: Export, *, report: Report = silent) -> dict[str, Any]:
    """Write a bundle into a new folder, without a repository; its version is 0. Returns its manifest's main fields."""
    with _new_folder(out_dir) as folder:
        manifest = build_bundle(folder, 0, export, export.run_dir / "templates", report=report).manifest
        bundle.sync_tree(folder)
    return {"step": manifest.step, "items": manifest.items, "watermark": manifest.watermark}


def export_plain_model(out_dir: Path, export: Export, *, report: Report = silent) -> dict[str, Any]:
    """Write a model for Triton's own ONNX Runtime backend into a new folder. Returns its main fields."""
    from exporter.onnx_graph import search_plan
    from exporter.plain import export_plain
    from exporter.trie import build_trie

    with _new_folder(out_dir) as folder:
        with timed(report, "checkpoint"):
            checkpoint, model, _ = _load(export)
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


def find_template(plan: GraphPlan, templates: Path, *, report: Report = silent, name: str = "") -> Path:
    """The template of a plan and its form for the CPU; traced where it is not there."""
    from exporter.optimise import CPU_TEMPLATE, ensure_cpu_graph
    from exporter.weights import ensure_template, template_key

    folder = templates / template_key(plan)
    if not (folder / CPU_TEMPLATE).exists():
        with timed(report, f"{name}template"):
            ensure_cpu_graph(ensure_template(plan, templates))
            bundle.sync_tree(folder)
    return folder


def make_templates(
    model: ModelConfig, reward: RewardModelConfig | None, width: int, templates: Path, scratch: Path, *,
    report: Report = silent,
) -> None:  # fmt: skip
    """Trace the templates that a run's versions will need, before its first checkpoint; each appears whole.

    `scratch` is a folder for this process alone: whoever starts a server meanwhile clears half templates away.
    """
    from exporter.onnx_graph import search_plan
    from exporter.optimise import CPU_TEMPLATE
    from exporter.reward_graph import reward_plan
    from exporter.weights import template_key

    plans = [("", search_plan(model, width)), *([("reward ", reward_plan(reward))] if reward else [])]
    shutil.rmtree(scratch, ignore_errors=True)
    for name, plan in plans:
        wanted = templates / template_key(plan)
        if not (wanted / CPU_TEMPLATE).exists():
            made = find_template(plan, scratch, report=report, name=name)
            shutil.rmtree(wanted, ignore_errors=True)
            made.rename(wanted)
    shutil.rmtree(scratch, ignore_errors=True)


def _load(export: Export) -> tuple[Checkpoint, OneRec, RewardModel | None]:
    """The checkpoint and its models; a checkpoint pruned by the trainer meanwhile is replaced by the newest one."""
    from trainer.checkpoint import latest_checkpoint, load_checkpoint, load_model, load_reward_model

    if export.checkpoint is not None:
        checkpoint = load_checkpoint(export.checkpoint)
        return checkpoint, load_model(checkpoint), load_reward_model(checkpoint)
    checkpoint = latest_checkpoint(export.run_dir)
    try:
        return checkpoint, load_model(checkpoint), load_reward_model(checkpoint)
    except OSError:
        checkpoint = latest_checkpoint(export.run_dir)
        return checkpoint, load_model(checkpoint), load_reward_model(checkpoint)


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
        sessions=_item_ids(snapshot, best),
    )


def _item_ids(snapshot: Snapshot, leaves: NDArray[np.int64]) -> list[list[str]]:
    """Item ids of sessions of leaves [n, m]."""
    return [[snapshot.item_ids[row] for row in rows] for rows in snapshot.trie.session_rows(leaves).tolist()]
