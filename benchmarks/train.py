"""Sessions a second and MFU of training, beside Hugging Face T5 with the same active parameters, in the same run.

    python benchmarks/train.py             # tiny and small; KuaiRand and simulator lengths, 64 and 256 history items
    python benchmarks/train.py --quick     # tiny only, few rounds
    ONEREC_DATA=... python benchmarks/train.py   # lengths from that folder's KuaiRand log, sessions by a gap of 12 h

A step is forward, backward, clipping and Adam on 64 sessions of 5 items. Each round times one matrix product in fp32
and one in bf16 (the peaks), one step of OneRec in each precision and one of T5 in each precision, in turn; the figures
are the best of the rounds, as on a machine that nothing else uses, and the median. MFU counts the multiplications that
the real tokens need (no padding, active experts only) against the peak of the same precision: the measured one, or
on a GPU that `DEVICE_PEAKS` knows that of its maker. There, beam search is timed too, and has its MFU.

T5 is `T5ForConditionalGeneration` with the same widths, layers and heads, a decoder FFN as wide as the chosen experts
together, one vocabulary for all levels, one encoder token an item, no dropout, fused AdamW (bf16: autocast), and
batches padded to their longest history.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from exporter.trie import build_trie
from simulator.log import write_world
from simulator.world import World, WorldConfig
from streaming.replay import Replay
from streaming.semantics import Semantics, SessionConfig
from streaming.store import Store
from streaming.windows import windows
from trainer.beam import beam_search, trie_tensors
from trainer.config import ModelConfig
from trainer.model import Batch, OneRec
from trainer.optim import Optimizer
from trainer.presets import active_parameters, preset, total_parameters

BATCH = 64
PEAK_SIDE = 2048
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
CASES = ("KuaiRand", "simulator", "64", "256")
BEAMS = 128
DEVICE_PEAKS = {
    "B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "A10": 125e12,
    "L4": 121e12,
}
"""bf16 FLOP/s without sparsity by their makers' data sheets; the first name that is part of the device's counts."""


def log_lengths(files: list[str], wanted: str, session: SessionConfig) -> np.ndarray:
    """History lengths of all training windows of a log."""
    lengths: list[int] = []
    with tempfile.TemporaryDirectory() as state, Store(Path(state), Semantics(session=session)) as store:
        Replay(store, files, wanted=wanted).run()
        for _, found in store.sessions():
            if found.high_quality:
                lengths += [len(window.history) for window in windows(found, 5, 256)]
    return np.array(lengths)


def kuairand_lengths(folder: str | None, count: int, rng: np.random.Generator) -> tuple[np.ndarray, str]:
    """History lengths of `count` training windows, and where they are from."""
    if folder is None:
        # A log-normal with median and 90th percentile of the log that ONEREC_DATA would give (25 and 53).
        drawn = np.exp(rng.normal(np.log(25), np.log(53 / 25) / 1.2816, count))
        return np.clip(np.rint(drawn), 0, 256).astype(int), "log-normal, p50 25, p90 53"
    files = sorted(str(path) for pattern in ("history*", "events*") for path in Path(folder).glob(pattern))
    session = SessionConfig(gap_ms=43_200_000, min_watched=3, min_total_watch_ms=30_000, min_interactions=0)
    lengths = log_lengths(files, "kuairand", session)
    return rng.choice(lengths, count), f"KuaiRand log, {len(lengths):,} windows"


def simulator_lengths(count: int, rng: np.random.Generator) -> np.ndarray:
    """History lengths of `count` training windows of a small simulated world."""
    with tempfile.TemporaryDirectory() as folder:
        events = Path(folder, "world.jsonl")
        write_world(World(WorldConfig(users=200, items=500, days=7)), events, Path(folder, "world.items.jsonl"))
        return rng.choice(log_lengths([str(events)], "auto", SessionConfig()), count)


def make_batches(config: ModelConfig, lengths: np.ndarray, rng: np.random.Generator, device: str = "cpu") -> list[Batch]:
    """Random codes at the given history lengths, `BATCH` sessions each."""
    batches = []
    for start in range(0, len(lengths), BATCH):
        part = torch.from_numpy(lengths[start : start + BATCH])
        longest = max(1, int(part.max()))
        batches.append(
            Batch(
                torch.from_numpy(rng.integers(0, config.codes, (len(part), longest, config.levels))),
                torch.arange(longest) < part[:, None],
                torch.from_numpy(rng.integers(0, config.codes, (len(part), config.session_items, config.levels))),
                torch.ones(len(part), config.session_items, dtype=torch.bool),
            )
        )
    return [Batch(*(tensor.to(device) for tensor in batch)) for batch in batches]


def step_flops(config: ModelConfig, lengths: np.ndarray) -> float:
    """Floating-point operations of forward and backward (3 × forward) over real positions, chosen experts only."""
    d, layers = config.d_model, config.decoder_layers
    memory = 1.0 + lengths
    queries = config.session_items * (config.levels + 1) - 1
    encoder = config.encoder_layers * (memory * (4 * d * d + 2 * d * config.d_ff) + 2 * d * memory**2)
    expert = config.top_k * 2 * d * config.d_ff + config.experts * d
    decoder = layers * (queries * (6 * d * d + expert) + 2 * d * d * memory + 2 * d * queries * (queries + memory))
    heads = config.session_items * config.levels * config.codes * d
    return float(3 * 2 * (encoder + decoder + heads).sum())


def search_flops(config: ModelConfig, lengths: np.ndarray, width: int) -> float:
    """Floating-point operations of a beam search over real positions: the first code has one beam, the rest `width`."""
    d, memory = config.d_model, 1.0 + lengths
    queries = config.session_items * (config.levels + 1) - 1
    rows = 1 + width * (queries - 1)
    encoder = config.encoder_layers * (memory * (4 * d * d + 2 * d * config.d_ff) + 2 * d * memory**2)
    expert = config.top_k * 2 * d * config.d_ff + config.experts * d
    of_memory = config.decoder_layers * 2 * d * d * memory
    decoder = config.decoder_layers * rows * (6 * d * d + expert + 2 * d * (queries / 2 + memory))
    heads = (1 + width * (config.session_items * config.levels - 1)) * config.codes * d
    return float(2 * (encoder + of_memory + decoder + heads).sum())


def searching(config: ModelConfig, precision: str, device: str) -> Callable[[Batch], None]:
    """One batch of beam searches over a catalogue of 10,000 random items."""
    model = OneRec(config).to(device, PRECISIONS[precision]).eval()
    codes = np.random.default_rng(0).integers(0, config.codes, (10_000, config.levels)).astype(np.int32)
    trie = trie_tensors(build_trie(codes, config.codes), device)

    def search(batch: Batch) -> None:
        with torch.no_grad():
            beam_search(model, trie, batch.history, batch.history_mask, width=BEAMS)

    return search


def t5_step(config: ModelConfig, precision: str, device: str = "cpu") -> Callable[[Batch], None]:
    """One training step of T5 of the same size."""
    from transformers import T5Config, T5ForConditionalGeneration

    vocabulary = config.levels * config.codes + 2
    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=vocabulary, d_model=config.d_model, d_kv=config.d_model // config.heads, d_ff=config.d_ff,
            num_layers=config.encoder_layers, num_decoder_layers=config.decoder_layers, num_heads=config.heads,
            dropout_rate=0.0, tie_word_embeddings=False, use_cache=False, decoder_start_token_id=0, pad_token_id=0,
        )
    )
    for block in model.decoder.block:
        dense = block.layer[-1].DenseReluDense
        dense.wi = torch.nn.Linear(config.d_model, config.top_k * config.d_ff, bias=False)
        dense.wo = torch.nn.Linear(config.top_k * config.d_ff, config.d_model, bias=False)
    model.to(device)
    adam = torch.optim.AdamW(model.parameters(), lr=2e-4, fused=True)
    offsets = 2 + torch.arange(config.levels, device=device) * config.codes

    def step(batch: Batch) -> None:
        history = torch.nn.functional.pad(batch.history[:, :, 0] + 2, (1, 0), value=1)
        mask = torch.nn.functional.pad(batch.history_mask, (1, 0), value=True)
        tokens = torch.nn.functional.pad(batch.targets + offsets, (1, 0), value=1).flatten(1)
        labels = torch.where(tokens == 1, -100, tokens)[:, 1:]
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            loss = model(
                input_ids=history, attention_mask=mask, decoder_input_ids=tokens[:, :-1].contiguous(),
                labels=labels.contiguous(),
            ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        adam.zero_grad(set_to_none=True)

    return step


def onerec_step(config: ModelConfig, precision: Any, device: str = "cpu") -> Callable[[Batch], None]:
    """One training step of OneRec."""
    optimizer = Optimizer(OneRec(config).to(device), precision=precision)

    def step(batch: Batch) -> None:
        optimizer.step(lambda model: model.loss(batch))

    return step


def timed(action: Callable[[], Any], clock: Callable[[], float]) -> float:
    """Seconds that `action` takes by `clock`, on the device too."""
    began = clock()
    action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - began


def device_peak(precision: str) -> float | None:
    """The maker's figure of the GPU's FLOP/s; None where it is to be measured."""
    if precision != "bf16" or not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((peak for part, peak in DEVICE_PEAKS.items() if all(word in name for word in part.split())), None)


def measure(config: ModelConfig, lengths: np.ndarray, rounds: int, clock: Callable[[], float]) -> dict[str, Any]:
    """Every contender in turn, `rounds` times over the batches of `lengths`."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batches = make_batches(config, lengths, np.random.default_rng(0), device)
    side = PEAK_SIDE * (4 if device == "cuda" else 1)
    sides = {name: torch.randn(side, side, device=device).to(dtype) for name, dtype in PRECISIONS.items()}
    steps = {f"onerec {name}": onerec_step(config, name, device) for name in PRECISIONS}
    steps |= {f"t5 {name}": t5_step(config, name, device) for name in PRECISIONS}
    if device == "cuda":
        steps |= {f"search {name}": searching(config, name, device) for name in PRECISIONS}
    seconds: dict[str, list[float]] = {name: [] for name in (*PRECISIONS, *steps)}
    for step in steps.values():
        step(batches[0])
    for _ in range(rounds):
        for name, factor in sides.items():
            seconds[name].append(timed(lambda factor=factor: factor @ factor, clock))  # type: ignore[misc]
        for name, step in steps.items():
            # All batches a round: their lengths differ.
            seconds[name].append(timed(lambda step=step: [step(batch) for batch in batches], clock) / len(batches))  # type: ignore[misc]
    flops = step_flops(config, lengths) / len(batches)
    result: dict[str, Any] = {"mean_items": float(lengths.mean()), "gflop_a_step": flops / 1e9}
    for name in PRECISIONS:
        measured = 2 * side**3 / min(seconds[name])
        peak = device_peak(name) or measured
        best = min(seconds[f"onerec {name}"])
        theirs = seconds[f"t5 {name}"]
        result[name] = {
            "peak_gflops": peak / 1e9,
            "measured_peak_gflops": measured / 1e9,
            "sessions_per_second": BATCH / best,
            "median_sessions_per_second": BATCH / statistics.median(seconds[f"onerec {name}"]),
            "mfu": flops / best / peak,
            "t5_sessions_per_second": BATCH / min(theirs),
            # Both of a pair ran one after the other, so their ratio hardly sees what else the machine did.
            "median_ratio_to_t5": statistics.median(
                their / our for our, their in zip(seconds[f"onerec {name}"], theirs, strict=True)
            ),
        }
        if f"search {name}" in seconds:
            search = min(seconds[f"search {name}"])
            result[name]["inference_mfu"] = search_flops(config, lengths, BEAMS) / len(batches) / search / peak
    ours, theirs_best = (
        max(result[name][key] for name in PRECISIONS) for key in ("sessions_per_second", "t5_sessions_per_second")
    )
    result["ratio_to_t5"] = ours / theirs_best
    return result


def main() -> None:
    """Measures, prints a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=None, help="default: tiny small")
    parser.add_argument("--rounds", type=int, default=None, help="default: 10 for tiny, 3 for the others")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall", help="cpu: seconds of CPU time, where others use the machine"
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="history lengths; default: all")
    parser.add_argument("--quick", action="store_true", help="tiny only, 3 rounds")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.clock == "cpu" and options.threads > 1:
        parser.error("--clock cpu needs --threads 1: threads that wait for each other count as working")
    clock = time.perf_counter if options.clock == "wall" else time.process_time
    torch.set_num_threads(options.threads)
    rng = np.random.default_rng(0)
    cases = {name: np.full(BATCH, int(name)) for name in options.cases if name.isdigit()}
    source = "not asked for"
    if "simulator" in options.cases:
        cases = {"simulator": simulator_lengths(4 * BATCH, rng), **cases}
    if "KuaiRand" in options.cases:
        real, source = kuairand_lengths(os.environ.get("ONEREC_DATA"), 4 * BATCH, rng)
        cases = {"KuaiRand": real, **cases}
    results = []
    for name in options.presets or (["tiny"] if options.quick else ["tiny", "small"]):
        config = preset(name, history_tokens="item")
        rounds = options.rounds or (3 if options.quick or name != "tiny" else 10)
        for case, lengths in cases.items():
            found = measure(config, lengths, rounds, clock)
            results.append({"preset": name, "history": case, "rounds": rounds, **found})
    if options.json:
        print(json.dumps({"threads": options.threads, "clock": options.clock, "kuairand_lengths": source, "results": results}))
        return
    table = Table(
        "preset", "history", "mean", "precision", "sessions/s", "(median)", "peak GFLOP/s", "MFU", "T5 sessions/s", "to T5",
        "(median)", "search MFU",
    )
    for row in results:
        for name in PRECISIONS:
            part = row[name]
            table.add_row(
                row["preset"], row["history"], f"{row['mean_items']:.0f}", name, f"{part['sessions_per_second']:,.0f}",
                f"{part['median_sessions_per_second']:,.0f}", f"{part['peak_gflops']:,.0f}", f"{part['mfu']:.1%}",
                f"{part['t5_sessions_per_second']:,.0f}",
                f"{part['sessions_per_second'] / part['t5_sessions_per_second']:.2f}x", f"{part['median_ratio_to_t5']:.2f}x",
                f"{part['inference_mfu']:.1%}" if "inference_mfu" in part else "no GPU",
            )
    console = Console(width=130)
    console.print(table)
    for name in dict.fromkeys(row["preset"] for row in results):
        config = preset(name)
        console.print(f"{name}: {total_parameters(config):,} parameters, {active_parameters(config):,} active")
    how = f"{options.threads} threads, {options.clock} clock; best of the rounds, medians in brackets"
    console.print(f"KuaiRand lengths: {source}; {how}")


if __name__ == "__main__":
    main()
