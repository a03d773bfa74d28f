"""Sessions a second and MFU of training, beside Hugging Face T5 with the same active parameters, in the same run.

    python benchmarks/train.py             # tiny and small; KuaiRand lengths, 64 and 256 history items
    python benchmarks/train.py --quick     # tiny only, few rounds
    ONEREC_DATA=... python benchmarks/train.py   # lengths from that folder's KuaiRand log, sessions by a gap of 12 h

A step is forward, backward, clipping and Adam on 64 sessions of 5 items. Each round times one matrix product in fp32
and one in bf16 (the peaks), one step of OneRec in each precision and one of T5 in each precision, in turn; the figures
are the best of the rounds, as on a machine that nothing else uses, and the median. MFU counts the multiplications that
the real tokens need (no padding, active experts only) against the peak of the same precision.

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

from trainer.config import ModelConfig
from trainer.model import Batch, OneRec
from trainer.optim import Optimizer
from trainer.presets import active_parameters, preset, total_parameters

BATCH = 64
PEAK_SIDE = 2048
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def kuairand_lengths(folder: str | None, count: int, rng: np.random.Generator) -> tuple[np.ndarray, str]:
    """History lengths of `count` training windows, and where they are from."""
    if folder is None:
        # A log-normal with the log's median (5) and 90th percentile (14).
        drawn = np.exp(rng.normal(np.log(5), np.log(14 / 5) / 1.2816, count))
        return np.clip(np.rint(drawn), 0, 256).astype(int), "log-normal, p50 5, p90 14"
    from streaming.replay import Replay
    from streaming.semantics import Semantics, SessionConfig
    from streaming.store import Store
    from streaming.windows import windows

    files = sorted(str(path) for pattern in ("history*", "events*") for path in Path(folder).glob(pattern))
    session = SessionConfig(gap_ms=43_200_000, min_watched=3, min_total_watch_ms=30_000, min_interactions=0)
    lengths: list[int] = []
    with tempfile.TemporaryDirectory() as state, Store(Path(state), Semantics(session=session)) as store:
        Replay(store, files, wanted="kuairand").run()
        for _, found in store.sessions():
            if found.high_quality:
                lengths += [len(window.history) for window in windows(found, 5, 256)]
    return rng.choice(np.array(lengths), count), f"KuaiRand log, {len(lengths):,} windows"


def make_batches(config: ModelConfig, lengths: np.ndarray, rng: np.random.Generator) -> list[Batch]:
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
    return batches


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


def t5_step(config: ModelConfig, precision: str) -> Callable[[Batch], None]:
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
    adam = torch.optim.AdamW(model.parameters(), lr=2e-4, fused=True)
    offsets = 2 + torch.arange(config.levels) * config.codes

    def step(batch: Batch) -> None:
        history = torch.nn.functional.pad(batch.history[:, :, 0] + 2, (1, 0), value=1)
        mask = torch.nn.functional.pad(batch.history_mask, (1, 0), value=True)
        tokens = torch.nn.functional.pad(batch.targets + offsets, (1, 0), value=1).flatten(1)
        labels = torch.where(tokens == 1, -100, tokens)[:, 1:]
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = model(
                input_ids=history, attention_mask=mask, decoder_input_ids=tokens[:, :-1].contiguous(),
                labels=labels.contiguous(),
            ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        adam.zero_grad(set_to_none=True)

    return step


def onerec_step(config: ModelConfig, precision: Any) -> Callable[[Batch], None]:
    """One training step of OneRec."""
    optimizer = Optimizer(OneRec(config), precision=precision)

    def step(batch: Batch) -> None:
        optimizer.step(lambda model: model.loss(batch))

    return step


def timed(action: Callable[[], Any], clock: Callable[[], float]) -> float:
    """Seconds that `action` takes by `clock`."""
    began = clock()
    action()
    return clock() - began


def measure(config: ModelConfig, lengths: np.ndarray, rounds: int, clock: Callable[[], float]) -> dict[str, Any]:
    """Every contender in turn, `rounds` times over the batches of `lengths`."""
    torch.manual_seed(0)
    batches = make_batches(config, lengths, np.random.default_rng(0))
    sides = {name: torch.randn(PEAK_SIDE, PEAK_SIDE).to(dtype) for name, dtype in PRECISIONS.items()}
    steps = {f"onerec {name}": onerec_step(config, name) for name in PRECISIONS}
    steps |= {f"t5 {name}": t5_step(config, name) for name in PRECISIONS}
    seconds: dict[str, list[float]] = {name: [] for name in (*PRECISIONS, *steps)}
    for step in steps.values():
        step(batches[0])
    for _ in range(rounds):
        for name, side in sides.items():
            seconds[name].append(timed(lambda side=side: side @ side, clock))  # type: ignore[misc]
        for name, step in steps.items():
            # All batches a round: their lengths differ.
            seconds[name].append(timed(lambda step=step: [step(batch) for batch in batches], clock) / len(batches))  # type: ignore[misc]
    flops = step_flops(config, lengths) / len(batches)
    result: dict[str, Any] = {"mean_items": float(lengths.mean()), "gflop_a_step": flops / 1e9}
    for name in PRECISIONS:
        peak = 2 * PEAK_SIDE**3 / min(seconds[name])
        best = min(seconds[f"onerec {name}"])
        result[name] = {
            "peak_gflops": peak / 1e9,
            "sessions_per_second": BATCH / best,
            "median_sessions_per_second": BATCH / statistics.median(seconds[f"onerec {name}"]),
            "mfu": flops / best / peak,
            "t5_sessions_per_second": BATCH / min(seconds[f"t5 {name}"]),
        }
    ours, theirs = (max(result[name][key] for name in PRECISIONS) for key in ("sessions_per_second", "t5_sessions_per_second"))
    result["ratio_to_t5"] = ours / theirs
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
    parser.add_argument("--quick", action="store_true", help="tiny only, 3 rounds")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.clock == "cpu" and options.threads > 1:
        parser.error("--clock cpu needs --threads 1: threads that wait for each other count as working")
    clock = time.perf_counter if options.clock == "wall" else time.process_time
    torch.set_num_threads(options.threads)
    rng = np.random.default_rng(0)
    real, source = kuairand_lengths(os.environ.get("ONEREC_DATA"), 4 * BATCH, rng)
    cases = {"KuaiRand": real, "64": np.full(BATCH, 64), "256": np.full(BATCH, 256)}
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
    table = Table("preset", "history", "precision", "sessions/s", "(median)", "peak GFLOP/s", "MFU", "T5 sessions/s", "to T5")
    for row in results:
        for name in PRECISIONS:
            part = row[name]
            table.add_row(
                row["preset"], row["history"], name, f"{part['sessions_per_second']:,.0f}",
                f"{part['median_sessions_per_second']:,.0f}", f"{part['peak_gflops']:,.0f}", f"{part['mfu']:.1%}",
                f"{part['t5_sessions_per_second']:,.0f}",
                f"{part['sessions_per_second'] / part['t5_sessions_per_second']:.2f}x",
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
