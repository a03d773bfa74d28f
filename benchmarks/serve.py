"""One request for a session: the ONNX graph of the whole beam search beside Hugging Face `generate`, in one run.

    python -m benchmarks.serve [--quick] [--json] [--keep-memory] [--run RUN]

`generate` runs a T5 of equal size: the same layers, width, heads and encoder FFN, in the decoder a dense FFN as wide as the
experts that one token uses. Its vocabulary is the levels' codes side by side plus two special tokens; it writes the same 15
codes (no BOS between items, which is in its favour), without a trie, and returns all beams. Its encoder reads as many
positions as ours (one an item with `history_tokens = "item"`), or, in the last column, one a code.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from exporter.onnx_graph import build_graph, search_plan
from exporter.trie import Trie, build_trie
from exporter.weights import GRAPH_FILE, ensure_template, write_weights
from trainer.attention import KeyValue
from trainer.beam import beam_search, trie_tensors
from trainer.config import ModelConfig
from trainer.model import Batch, OneRec
from trainer.presets import PRESETS

ITEMS = 100_000
SPECIALS = 2
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "1000000000000", "MALLOC_TOP_PAD_": "268435456"}
"""glibc keeps freed memory, so that large tensors cost no page faults; the best case for `generate`."""


class Uncached(OneRec):
    """The same model without a KV cache: its "cache" is the input so far, and each step decodes all of it anew."""

    def decode(
        self,
        tokens_embedded: Tensor,
        positions: Tensor,
        self_kv: list[KeyValue] | None,
        cross_kv: list[KeyValue],
        memory_mask: Tensor,
        routings: list | None = None,
    ) -> tuple[Tensor, list[KeyValue]]:
        """As `OneRec.decode`, slower."""
        so_far = tokens_embedded if self_kv is None else torch.cat((self_kv[0][0][:, 0], tokens_embedded), dim=1)
        hidden, _ = super().decode(so_far, torch.arange(so_far.shape[1]), None, cross_kv, memory_mask, routings)
        kept = so_far.unsqueeze(1)
        return hidden[:, -tokens_embedded.shape[1] :], [(kept, kept)]


def hugging_face(config: ModelConfig) -> nn.Module:
    """A T5 of equal size."""
    from transformers import T5Config, T5ForConditionalGeneration

    settings = T5Config(
        vocab_size=config.levels * config.codes + SPECIALS,
        d_model=config.d_model,
        d_kv=config.d_model // config.heads,
        num_heads=config.heads,
        num_layers=config.encoder_layers,
        num_decoder_layers=config.decoder_layers,
        d_ff=config.d_ff,
        feed_forward_proj="relu",
        dropout_rate=0.0,
        tie_word_embeddings=False,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=None,
    )
    model = T5ForConditionalGeneration(settings)
    wide = copy.deepcopy(model.config)
    wide.d_ff = config.top_k * config.d_ff
    for block in model.decoder.block:
        block.layer[-1].DenseReluDense = type(block.layer[-1].DenseReluDense)(wide)
    return model.eval()


class Cost(NamedTuple):
    """Seconds of one call: by the clock, and of the processor, all threads together."""

    wall: float
    cpu: float


def costs_of(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, Cost]:
    """The least cost of each call, after one to warm up, called in turn: what a busy machine adds is no one's cost.

    A call of more than 20 s counts the first time and is not repeated.
    """
    found: dict[str, list[Cost]] = {name: [] for name in calls}
    for turn in range(1 + repeats):
        for name, call in calls.items():
            if found[name] and found[name][0].wall > 20:
                continue
            wall, cpu = time.perf_counter(), time.process_time()
            call()
            spent = Cost(time.perf_counter() - wall, time.process_time() - cpu)
            if turn > 0 or spent.wall > 20:
                found[name].append(spent)
    return {name: Cost(*(min(part) for part in zip(*costs, strict=True))) for name, costs in found.items()}


def open_graph(path: Path, threads: int) -> onnxruntime.InferenceSession:
    """The graph on the CPU."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def sharp_model(config: ModelConfig) -> OneRec:
    """An untrained model whose predictions differ as a trained one's do; time does not depend on the weights."""
    torch.manual_seed(0)
    model = OneRec(config).eval()
    with torch.no_grad():
        for head in model.level_head:
            head.mul_(10)
    return model


def compare(preset: str, config: ModelConfig, arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Latency of both, for each beam width, history length and batch size."""
    random = np.random.default_rng(0)
    model, other = sharp_model(config), hugging_face(config)
    trie = build_trie(random.integers(0, config.codes, (arguments.items, config.levels)), config.codes)
    rows = []
    for width in (128,) if arguments.quick else arguments.widths:
        graph = _write_graph(model, width, folder / f"{preset}-{width}", folder, arguments.threads)
        for items in (64,) if arguments.quick else (64, 256):
            for batch in (1,) if arguments.quick else (1, 8):
                history = random.integers(0, config.codes, (batch, items, config.levels))
                feed = {"history": history, "history_mask": np.ones((batch, items), dtype=bool), **trie.arrays()}
                positions = items * (1 if config.history_tokens == "item" else config.levels)
                calls = {
                    "onnx": lambda: graph.run(None, feed),  # noqa: B023
                    "generate": _generation(other, config, batch, positions, width),
                }
                if batch == 1:  # more would not fit into memory beside other work
                    calls["generate_codes"] = _generation(other, config, batch, items * config.levels, width)
                found = costs_of(calls, arguments.repeats)
                row: dict[str, Any] = {"preset": preset, "width": width, "history": items, "batch": batch}
                for name, spent in found.items():
                    row |= {name: spent.wall, f"{name}_cpu": spent.cpu}
                    row |= {f"{name}_times": spent.wall / found["onnx"].wall}
                    row |= {f"{name}_times_cpu": spent.cpu / found["onnx"].cpu}
                rows.append(row)
                print(json.dumps(row), file=sys.stderr)
    return rows


def _write_graph(model: OneRec, width: int, version: Path, folder: Path, threads: int) -> onnxruntime.InferenceSession:
    template = ensure_template(search_plan(model.config, width), folder / "templates")
    write_weights(model.state_dict(), template, version)
    return open_graph(version / GRAPH_FILE, threads)


def _generation(model: nn.Module, config: ModelConfig, batch: int, length: int, width: int) -> Callable[[], None]:
    """A call of `generate` on histories of `length` tokens."""
    ids = torch.randint(SPECIALS, SPECIALS + config.levels * config.codes, (batch, length))
    codes = config.session_items * config.levels

    def call() -> None:
        with torch.inference_mode():
            found = model.generate(  # type: ignore[operator]
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                num_beams=width,
                num_return_sequences=width,
                min_new_tokens=codes,
                max_new_tokens=codes,
                do_sample=False,
            )
        if found.shape != (batch * width, 1 + codes):
            raise RuntimeError(f"generate wrote {tuple(found.shape)}")

    return call


def costs(preset: str, config: ModelConfig, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What the trie costs in the graph, and what a search without the KV cache would cost, at the widest beam.

    Processor seconds, the graph on one thread: a second one that waits would count too.
    """
    width, items = 128, 64
    random = np.random.default_rng(1)
    model = sharp_model(config)
    history = random.integers(0, config.codes, (1, items, config.levels))
    mask = np.ones((1, items), dtype=bool)
    feed = {"history": history, "history_mask": mask}
    constrained = _write_graph(model, width, folder / f"{preset}-{width}", folder, threads=1)
    version = folder / f"{preset}-free"
    write_weights(model.state_dict(), ensure_template(search_plan(config, width), folder / "templates"), version)
    (version / GRAPH_FILE).unlink()  # a link to the template
    onnx.save(build_graph(config, width, constrained=False), version / GRAPH_FILE)
    free = open_graph(version / GRAPH_FILE, threads=1)
    uniform = random.integers(0, config.codes, (arguments.items, config.levels))
    skewed = uniform.copy()
    skewed[: len(skewed) // 2, 0] = 0  # half of the catalogue below one code
    arrays = {name: build_trie(codes, config.codes).arrays() for name, codes in (("trie", uniform), ("skewed", skewed))}
    runs: dict[str, Callable[[], Any]] = {"free": lambda: free.run(None, feed)}
    runs |= {name: partial(constrained.run, None, feed | trie) for name, trie in arrays.items()}
    found = {name: spent.cpu for name, spent in costs_of(runs, 8 * arguments.repeats).items()}
    uncached = Uncached(config).eval()
    uncached.load_state_dict(model.state_dict())
    tensors = trie_tensors(build_trie(uniform, config.codes))
    search = partial(
        beam_search, trie=tensors, history=torch.from_numpy(history), history_mask=torch.from_numpy(mask), width=width
    )
    torch_times = costs_of({"cached": lambda: search(model), "uncached": lambda: search(uncached)}, arguments.repeats)
    return {
        "preset": preset,
        "free": found["free"],
        "trie": found["trie"],
        "trie_cost": found["trie"] / found["free"] - 1,
        "skewed_cost": found["skewed"] / found["free"] - 1,
        "torch": torch_times["cached"].cpu,
        "no_cache": torch_times["uncached"].cpu,
        "no_cache_times": torch_times["uncached"].cpu / torch_times["cached"].cpu,
    }


def legality(arguments: argparse.Namespace) -> dict[str, Any]:
    """Share of the beams that hold an illegal item, or an item twice, with and without the trie, on a trained model."""
    from trainer.beam import free_search

    model, trie, origin = _trained_run(arguments.run) if arguments.run else _trained_here(arguments)
    config = model.config
    random = np.random.default_rng(2)
    rows = random.integers(0, trie.items, (16, 20))
    codes = np.empty((trie.items, config.levels), dtype=np.int64)
    codes[trie.leaf_rows] = np.repeat(trie.tuples, np.diff(trie.leaf_pointers), axis=0)
    history, mask = torch.from_numpy(codes[rows]), torch.ones(rows.shape, dtype=torch.bool)
    width = 128
    free = trie.lookup(free_search(model, history, mask, width=width).codes.numpy())
    beams = beam_search(model, trie_tensors(trie), history, mask, width=width)
    sessions = trie.session_rows(beams.leaves[beams.alive].numpy())
    legal = free[(free >= 0).all(axis=-1)]
    held = np.diff(trie.leaf_pointers)
    overused = [any(row.count(leaf) > held[leaf] for leaf in row) for row in legal.tolist()]
    return {
        "model": origin,
        "items": trie.items,
        "free_illegal": float((free < 0).any(-1).mean()),
        "free_illegal_items": float((free < 0).mean()),
        "free_repeats": float(np.mean(overused)) if overused else None,
        "trie_illegal": float((trie.lookup(codes[sessions]) < 0).mean()),
        "trie_repeats": float(np.mean([len(set(row)) < len(row) for row in sessions.tolist()])),
        "trie_dead": 1.0 - float(beams.alive.float().mean()),
    }


def _trained_run(run: Path) -> tuple[OneRec, Trie, str]:
    from trainer.checkpoint import latest_checkpoint, load_model
    from trainer.items import load_catalogue

    checkpoint = latest_checkpoint(run)
    catalogue = load_catalogue(Path(json.loads((run / "run.json").read_bytes())["state"]))
    model = load_model(checkpoint).eval()
    return model, build_trie(catalogue.item_codes, model.config.codes), f"{run.name}, step {checkpoint.step}"


def _trained_here(arguments: argparse.Namespace) -> tuple[OneRec, Trie, str]:
    """`tiny` after some steps on sessions of items that lie near each other in a catalogue of 5,000."""
    config, steps = PRESETS["tiny"], 60 if arguments.quick else 300
    random = np.random.default_rng(3)
    codes = np.sort(random.integers(0, config.codes, (5000, config.levels)).view("i8,i8,i8"), axis=0).view(np.int64)
    codes = codes.reshape(5000, config.levels)
    torch.manual_seed(0)
    model = OneRec(config)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    for _ in range(steps):
        near = random.integers(0, 4900, (64, 1)) + random.integers(0, 100, (64, 15))
        rows = torch.from_numpy(codes[near])
        everything = torch.ones(64, 10, dtype=torch.bool)
        batch = Batch(rows[:, :10], everything, rows[:, 10:], everything[:, :5])
        loss, _ = model.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval(), build_trie(codes, config.codes), f"tiny, {steps} steps on synthetic sessions"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.1%}"


def show(report: dict[str, Any]) -> None:
    """Tables for people."""
    console = Console(width=130)
    table = Table(title=f"ms a request, {report['threads']} threads; how many times the graph: wall / processor time")
    theirs = ("generate, as many positions", "generate, a token a code")
    for name in ("preset", "beams", "history", "batch", "ONNX graph", *theirs):
        table.add_column(name, justify="left" if name == "preset" else "right")
    for row in report["latency"]:
        numbers = [row["width"], row["history"], row["batch"], f"{1e3 * row['onnx']:,.0f}"]
        cells = [
            f"{1e3 * row[name]:,.0f} ({row[f'{name}_times']:.1f} / {row[f'{name}_times_cpu']:.1f}×)" if row[name] else "–"
            for name in ("generate", "generate_codes")
        ]
        table.add_row(row["preset"], *map(str, numbers), *cells)
    console.print(table)
    for row in report["costs"]:
        console.print(
            f"{row['preset']}, 128 beams, 64 items: trie {row['trie_cost']:+.1%} (half of the items below one code: "
            f"{row['skewed_cost']:+.1%}); without the KV cache {row['no_cache_times']:.2f}× in torch"
        )
    legal = report["legality"]
    console.print(
        f"illegal sessions without the trie {legal['free_illegal']:.1%} (items {legal['free_illegal_items']:.1%}), with it "
        f"{legal['trie_illegal']:.0%}; an item twice in a legal session: {_percent(legal['free_repeats'])} and "
        f"{legal['trie_repeats']:.0%} "
        f"({legal['model']}, {legal['items']:,} items)"
    )


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="128 beams, 64 items, batch 1 only")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("--keep-memory", action="store_true", help="start again with an allocator that keeps memory")
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3, help="timed calls of each, the least counts")
    parser.add_argument("--items", type=int, default=ITEMS, help="size of the catalogue")
    parser.add_argument("--presets", nargs="+", default=["tiny", "small"], choices=sorted(PRESETS))
    parser.add_argument("--run", type=Path, help="a training run whose model shows the share of illegal sessions")
    arguments = parser.parse_args()
    if arguments.keep_memory and not ALLOCATOR.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks.serve", *sys.argv[1:]], {**os.environ, **ALLOCATOR})
    torch.set_num_threads(arguments.threads)
    report: dict[str, Any] = {"threads": arguments.threads, "keep_memory": arguments.keep_memory, "latency": [], "costs": []}
    with tempfile.TemporaryDirectory() as scratch:
        for preset in arguments.presets:
            report["latency"] += compare(preset, PRESETS[preset], arguments, Path(scratch))
            report["costs"].append(costs(preset, PRESETS[preset], arguments, Path(scratch)))
        report["legality"] = legality(arguments)
    if arguments.json:
        print(json.dumps(report))
    else:
        show(report)


if __name__ == "__main__":
    main()
