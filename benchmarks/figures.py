"""The paper's figures 4, 5 and 6 on simulated worlds, where the truth is known: a plot and its JSON each.

    python -m benchmarks.figures r-dpo   [--quick] [--seeds N] [--work DIR] [--out DIR]
    python -m benchmarks.figures codes   [...]
    python -m benchmarks.figures scaling [...]

`r-dpo`: rewards of generated sessions, true and modelled, and the sampler's seconds, by the share of the sessions that
become preference pairs. `codes`: what the model thinks of each level's codes before and after alignment. `scaling`: loss
and hit rate of larger and larger models on the same windows. With `--work` they share worlds and models.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from benchmarks.markers import put_between
from benchmarks.seed_models import (
    DOCUMENT,
    FIGURES,
    FULL,
    QUICK,
    Floats,
    Ground,
    Say,
    Start,
    architecture,
    begin,
    generated,
    learn,
    new_model,
    of_cases,
    parser_of,
    pyplot_agg,
    seed_model,
    teller,
    write_json,
)
from trainer.batches import window_batch
from trainer.config import PreferenceConfig, RewardConfig
from trainer.evaluate import RANKED, rank_scores
from trainer.inline import AlignConfig, Alignment, align
from trainer.judge import Case, OneRecRecommender
from trainer.model import OneRec
from trainer.presets import active_parameters, total_parameters
from trainer.reward import combine
from trainer.reward_weights import TARGETS

RATIOS = (0.0, 0.005, 0.01, 0.02, 0.05, 0.2)
"""The paper's, and one beyond, to see whether there is more to gain."""
PAPER_RATIO, PAPER_MOST = 0.01, 0.05
WIDTH = 32
"""Sessions generated for a case to be judged."""
RESAMPLES = 2_000


class Aligning(msgspec.Struct, frozen=True, kw_only=True):
    """How the seed model is aligned, for every ratio alike."""

    passes: int = 2
    snapshots: int = 4
    learning_rate: float = 3e-4
    beta: float = 0.5
    weight: float = 1.0
    responses: int = 64


ALIGNING = Aligning()


class Aligned(NamedTuple):
    """An aligned model and what aligning it took."""

    model: OneRec
    record: dict[str, Any]


def aligned(start: Start, ratio: float, how: Aligning = ALIGNING) -> Aligned:
    """The seed model aligned with r_DPO = `ratio` (0: as many steps of next-token prediction), kept beside it."""
    name = f"aligned-{ratio}"
    weights, record = start.folder / f"{name}.safetensors", start.folder / f"{name}.json"
    model = seed_model(start)
    if record.exists():
        model.load_state_dict(load_file(weights))
        return Aligned(model.eval(), msgspec.json.decode(record.read_bytes()))
    done: Alignment = align(
        model, start.examples, start.catalogue.item_codes, start.reward_model,
        settings=PreferenceConfig(ratio=ratio, responses=how.responses, beta=how.beta, weight=how.weight),
        reward=RewardConfig(),
        config=AlignConfig(
            snapshots=how.snapshots, passes=how.passes, batch_windows=start.ground.batch_windows,
            learning_rate=how.learning_rate, seed=start.seed,
        ),
    )
    kept = msgspec.to_builtins(done)
    del kept["lines"]
    save_file(model.state_dict(), weights)
    record.write_bytes(msgspec.json.encode(kept))
    start.say(f"r_DPO {ratio:.1%}: {done.pairs} pairs, sampler {done.sampler_seconds:.1f} s, "
             f"trainer {done.trainer_seconds:.1f} s")
    return Aligned(model, kept)


def hit_rate(recommender: OneRecRecommender, cases: Sequence[Case]) -> Floats:
    """HR@10 of the next item, by case."""
    ranked = recommender.items(cases, RANKED)
    return np.array([
        rank_scores(rows.tolist(), int(case.targets[0]))["hit@10"] for case, rows in zip(cases, ranked, strict=True)
    ])


def share_of_gain(base: Floats, some: Floats, most: Floats) -> tuple[float, float, float]:
    """(mean some - mean base) / (mean most - mean base) over paired cases [n], with its 95 % bootstrap interval."""
    rng = np.random.default_rng(0)
    places = rng.integers(len(base), size=(RESAMPLES, len(base)))
    shares = (some - base)[places].mean(axis=1) / (most - base)[places].mean(axis=1)
    low, high = np.quantile(shares, [0.025, 0.975]).tolist()
    return float((some - base).mean() / (most - base).mean()), low, high


def r_dpo(ground: Ground, seeds: int, work: Path, say: Say, ratios: Sequence[float] = RATIOS) -> dict[str, Any]:
    """Rewards and costs by ratio, over all cases of all seeds; `seed` is the model before alignment.

    `ratios` hold 0 and the paper's 1 % and 5 %.
    """
    told: dict[str, list[dict[str, Floats]]] = {}
    hits: dict[str, list[Floats]] = {}
    spent: dict[str, list[dict[str, Any]]] = {}
    for seed in range(seeds):
        start = begin(ground, seed, work, say)
        for ratio in (None, *ratios):
            name = "seed" if ratio is None else str(ratio)
            made = Aligned(seed_model(start), {}) if ratio is None else aligned(start, ratio)
            recommender = OneRecRecommender(made.model, start.catalogue.item_codes)
            told.setdefault(name, []).append(generated(recommender, start.cases, start.rewards, WIDTH))
            hits.setdefault(name, []).append(hit_rate(recommender, start.cases))
            spent.setdefault(name, []).append(made.record)
            say(f"{name}: true swt {told[name][-1]['true'][:, 0, 0].mean():.4f}")
    rewards = {
        name: {by: np.concatenate([part[by] for part in parts]) for by in ("true", "modelled")}
        for name, parts in told.items()
    }
    points = [
        {
            "r_dpo": None if name == "seed" else float(name),
            "hr@10": float(np.concatenate(hits[name]).mean()),
            **{by: _named(values[by].mean(axis=0)) for by in ("true", "modelled")},
            **{key: sum(record[key] for record in spent[name]) for key in ("pairs", "sampler_seconds", "trainer_seconds")
               if name != "seed"},
        }
        for name, values in rewards.items()
    ]
    some, most, last = str(PAPER_RATIO), str(PAPER_MOST), str(max(ratios))
    shares = [
        {
            "of": float(one), "against": float(other), "over": base, "judge": by,
            **{
                f"{target} {kind}": share_of_gain(*(rewards[name][by][:, row, column] for name in (base, one, other)))
                for column, target in enumerate(TARGETS) for row, kind in enumerate(("mean", "max"))
            },
        }
        for one, other, base, by in (
            (some, most, "0.0", "true"), (some, most, "0.0", "modelled"), (some, most, "seed", "true"),
            (most, last, "0.0", "true"),
        )
        if one != other
    ]
    return {"figure": "r-dpo", "ground": msgspec.to_builtins(ground), "aligning": msgspec.to_builtins(ALIGNING),
            "seeds": seeds, "cases": len(rewards["seed"]["true"]), "width": WIDTH, "points": points,
            "share_of_gain": shares}


def _named(values: Floats) -> dict[str, dict[str, float]]:
    """[3, 4] as target -> mean, max, first."""
    return {
        target: dict(zip(("mean", "max", "first"), values[:, column].tolist(), strict=True))
        for column, target in enumerate(TARGETS)
    }


def draw_r_dpo(record: dict[str, Any], path: Path) -> None:
    """Watch time and likes by ratio, true and modelled; what the sampler and the trainer took."""
    pyplot = pyplot_agg()
    points = [point for point in record["points"] if point["r_dpo"] is not None]
    before = next(point for point in record["points"] if point["r_dpo"] is None)
    ratios = [100 * point["r_dpo"] for point in points]
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4))
    for axis, target, title in (
        (axes[0], "swt", "watch time of a session, 1 = 5 min (swt)"), (axes[1], "ltr", "probability of a like (ltr)"),
    ):
        for by, colour in (("true", "tab:red"), ("modelled", "tab:blue")):
            for kind, line in (("max", "--"), ("mean", "-")):
                axis.plot(ratios, [point[by][target][kind] for point in points], line, marker="o", color=colour,
                          markersize=4, label=f"{by}, {kind} of {record['width']}")
            axis.axhline(before[by][target]["mean"], color=colour, linewidth=0.8, linestyle=":",
                         label=f"{by}, mean, seed model")
        axis.set_ylabel(title)
    axes[2].plot(ratios, [point["sampler_seconds"] / record["seeds"] for point in points], marker="o",
                 color="tab:green", label="sampler")
    axes[2].plot(ratios, [point["trainer_seconds"] / record["seeds"] for point in points], marker="o",
                 color="tab:gray", label="trainer")
    for ratio, point in zip(ratios, points, strict=True):
        axes[2].annotate(f"{point['pairs'] // record['seeds']}", (ratio, point["sampler_seconds"] / record["seeds"]),
                         textcoords="offset points", xytext=(0, 6), ha="center", fontsize=7)
    for axis in axes:
        axis.set_xscale("symlog", linthresh=1)
        axis.set_xticks(ratios, [f"{ratio:g}" for ratio in ratios])
        axis.set_xlim(-0.15, 1.3 * max(ratios))
        axis.minorticks_off()
        axis.set_xlabel("$r_{DPO}$, % of sessions")
    axes[2].set_ylabel("compute, s on one core (numbers: pairs)")
    axes[2].set_ylim(bottom=0)
    axes[2].legend(frameon=False, fontsize=8)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncol=6, frameon=False, fontsize=8, handlelength=3.5)
    _finish(figure, axes, f"One seed model, aligned with more and more pairs ({record['cases']} cases)", path)


def table_r_dpo(record: dict[str, Any]) -> str:
    """The points as Markdown."""
    rows = ["| r_DPO | pairs | sampler, s | trainer, s | true swt mean / max / shown | modelled swt mean / max / shown | "
            "true ltr mean | HR@10 |", "|---|---:|---:|---:|---|---|---:|---:|"]
    for point in record["points"]:
        name = "seed model" if point["r_dpo"] is None else f"{point['r_dpo']:.1%}"
        cost = (f"{point['pairs']} | {point['sampler_seconds']:.1f} | {point['trainer_seconds']:.0f}" if "pairs" in point
                else "– | – | –")
        swt = [" / ".join(f"{point[by]['swt'][kind]:.4f}" for kind in ("mean", "max", "first"))
               for by in ("true", "modelled")]
        rows.append(f"| {name} | {cost} | {swt[0]} | {swt[1]} | {point['true']['ltr']['mean']:.4f} | {point['hr@10']:.3f} |")
    shares = record["share_of_gain"]
    names = [f"{share['judge']}, {share['of']:.0%} of {share['against']:.0%}, over "
             f"{'the seed model' if share['over'] == 'seed' else '0 %'}" for share in shares]
    rows += ["", "Gain of one r_DPO as a share of that of another (95 % interval over cases):", "",
             f"| | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for target in TARGETS:
        for kind in ("mean", "max"):
            cells = [f"{100 * share:.0f} % ({100 * low:.0f} to {100 * high:.0f})"
                     for share, low, high in (values[f"{target} {kind}"] for values in shares)]
            rows.append(f"| {target} {kind} | {' | '.join(cells)} |")
    return "\n".join(rows)


BY_RATIO = {"seed model": None, "trained on, no pairs": 0.0, "IPA, 1 %": PAPER_RATIO, "IPA, 20 %": max(RATIOS)}
"""The models whose codes are shown; None is the seed model itself. Training on changes it too, so that it stands beside."""


def codes(
    ground: Ground, seeds: int, work: Path, say: Say, ratios: Mapping[str, float | None] = BY_RATIO
) -> dict[str, Any]:
    """Probabilities of each level's codes before and after IPA, on the way to the item of the highest modelled reward.

    Level l is asked for behind the star's own codes of the levels above. The case shown is the one whose star's
    log-probability changed by the median from the first model to the last.
    """
    entropies: dict[str, list[Floats]] = {name: [] for name in ratios}
    stars: dict[str, list[Floats]] = {name: [] for name in ratios}
    truth: list[float] = []
    shown: dict[str, Any] = {}
    first, *_, last = ratios
    for seed in range(seeds):
        start = begin(ground, seed, work, say)
        item_codes = start.catalogue.item_codes
        best, quantile = _stars(start)
        truth.append(quantile)
        given = item_codes[best]
        found = {}
        for name, ratio in ratios.items():
            model = seed_model(start) if ratio is None else aligned(start, ratio).model
            found[name] = _distributions(model, start.cases, item_codes, given)
            entropies[name].append(-(found[name] * np.log(found[name].clip(1e-30))).sum(axis=-1))
            stars[name].append(np.take_along_axis(found[name], given[:, :, None].astype(np.int64), axis=2)[:, :, 0])
            say(f"seed {seed}, {name}: entropy {entropies[name][-1].mean(axis=0).round(2)}")
        if not shown:
            moved = np.log(stars[last][0]).sum(axis=1) - np.log(stars[first][0]).sum(axis=1)
            case = int(np.argsort(moved, kind="stable")[len(moved) // 2])
            shown = {"user": start.cases[case].user_id, "star": given[case].tolist(),
                     "probabilities": {name: found[name][case].tolist() for name in ratios}}
    means = {}
    for name in ratios:
        entropy, star = np.concatenate(entropies[name]), np.concatenate(stars[name])
        means[name] = {
            "entropy": entropy.mean(axis=0).tolist(), "star": star.mean(axis=0).tolist(),
            "entropy_error": (entropy.std(axis=0, ddof=1) / len(entropy) ** 0.5).tolist(),
        }
    return {"figure": "codes", "ground": msgspec.to_builtins(ground), "ratios": dict(ratios), "seeds": seeds,
            "cases": sum(map(len, stars[first])), "codes": ground.config.catalogue.codes, "means": means, "shown": shown,
            "true_quantile_of_star": float(np.mean(truth))}


def _stars(start: Start) -> tuple[NDArray[np.int64], float]:
    """Row of the item that the reward model likes best, by case, and where the truth ranks it (mean quantile, 1 = best)."""
    rows = np.arange(len(start.catalogue.item_ids))[:, None]
    best, quantiles = [], []
    for case in start.cases:
        star = int(_single_rewards(start, case).argmax())
        true = start.rewards["true"](case, rows).mean(axis=1)
        best.append(star)
        quantiles.append(float((true <= true[star]).mean()))
    return np.array(best), float(np.mean(quantiles))


@torch.no_grad()
def _single_rewards(start: Start, case: Case) -> Floats:
    """Modelled reward [N] of each item as a session of its own: the other places of the window are masked."""
    codes = torch.from_numpy(start.catalogue.item_codes.astype(np.int64))
    rows = torch.from_numpy(case.history[-start.reward_model.config.history_length :].astype(np.int64))
    history = codes[rows] if len(rows) else codes[:1]
    alone = F.pad(codes.unsqueeze(1), (0, 0, 0, start.m - 1))
    mask = torch.arange(start.m).expand(len(codes), -1) == 0
    told = start.reward_model.rewards(
        history.unsqueeze(0), torch.full((1, len(history)), bool(len(rows))), alone.unsqueeze(0), mask.unsqueeze(0)
    )
    return combine(told[0], RewardConfig()).double().numpy()


@torch.no_grad()
def _distributions(model: OneRec, cases: Sequence[Case], item_codes: np.ndarray, given: np.ndarray) -> Floats:
    """Softmax [cases, L, K] of the first item's codes, each behind the `given` [cases, L] ones above it."""
    found = []
    for place in range(0, len(cases), 64):
        batch = window_batch(of_cases(cases[place : place + 64]), item_codes, m=model.config.session_items)
        star = torch.from_numpy(given[place : place + 64].astype(np.int64)).unsqueeze(1)
        logits = model.token_logits(batch.history, batch.history_mask, star, batch.target_mask[:, :1])
        found.append(torch.softmax(logits[:, 0].double(), dim=-1).numpy())
    return np.concatenate(found)


def draw_codes(record: dict[str, Any], path: Path) -> None:
    """One case, level by level, a column a model; the red star is the best item's code."""
    pyplot = pyplot_agg()
    shown, star = record["shown"], record["shown"]["star"]
    names, levels = list(record["means"]), len(star)
    figure, axes = pyplot.subplots(levels, len(names), figsize=(3.8 * len(names), 2.3 * levels), sharex=True, sharey="row")
    for column, name in enumerate(names):
        for level in range(levels):
            axis, probabilities = axes[level, column], np.array(shown["probabilities"][name][level])
            entropy = -(probabilities * np.log(probabilities.clip(1e-30))).sum()
            axis.bar(np.arange(len(probabilities)), probabilities, color="tab:blue", width=1.0)
            axis.plot([star[level]], [probabilities[star[level]]], "*", color="red", markersize=11, clip_on=False, zorder=3)
            axis.set_title(f"{name}\nlevel {level + 1}: entropy {entropy:.2f} nats here, "
                           f"{record['means'][name]['entropy'][level]:.2f} on average", fontsize=8)
        axes[-1, column].set_xlabel(f"code (of {record['codes']})")
    for level in range(levels):
        axes[level, 0].set_ylabel(f"probability, level {level + 1}")
        axes[level, 0].set_ylim(0, 1.12 * max(max(shown["probabilities"][name][level]) for name in names))
    _finish(figure, axes, "The first item's codes; red star: the item of the highest modelled reward", path)


def table_codes(record: dict[str, Any]) -> str:
    """Mean entropies and probabilities of the star's codes as Markdown."""
    levels = range(1, len(record["shown"]["star"]) + 1)
    rows = [f"| | {' | '.join(f'entropy, level {level}' for level in levels)} | "
            f"{' | '.join(f'star, level {level}' for level in levels)} |", f"|---|{'---:|' * 2 * len(levels)}"]
    for name, values in record["means"].items():
        entropies = zip(values["entropy"], values["entropy_error"], strict=True)
        cells = [f"{entropy:.2f} ± {error:.2f}" for entropy, error in entropies]
        rows.append(f"| {name} | {' | '.join(cells)} | {' | '.join(f'{star:.3f}' for star in values['star'])} |")
    rows += ["", f"Entropies in nats (± standard error over {record['cases']} cases; uniform over {record['codes']} codes is "
             f"{np.log(record['codes']):.2f}); star: the mean probability of its code. "
             f"The true reward ranks the star above {record['true_quantile_of_star']:.1%} of the catalogue on average."]
    return "\n".join(rows)


SIZES: dict[str, dict[str, int]] = {  # width, encoder + decoder layers
    "d 32, 1 + 1": {"d_model": 32, "heads": 2, "encoder_layers": 1, "decoder_layers": 1, "d_ff": 64},
    "d 64, 2 + 2": {"d_model": 64, "heads": 2, "d_ff": 128},
    "tiny": {},
    "d 192, 3 + 3": {"d_model": 192, "heads": 6, "encoder_layers": 3, "decoder_layers": 3, "d_ff": 512},
}
SCALING_PASSES = 2


def scaling(
    ground: Ground, seeds: int, work: Path, say: Say, passes: int = SCALING_PASSES
) -> dict[str, Any]:
    """Test loss after each pass, and HR@10 after the last, of models of growing size on the same windows."""
    points: dict[str, dict[str, Any]] = {}
    count = 0
    for seed in range(seeds):
        start = begin(ground, seed, work, say)
        count += len(start.cases)
        for name, changes in SIZES.items():
            config = architecture(start, **changes)
            began = time.perf_counter()
            model, losses = _grown(new_model(config, seed), start, passes)
            seconds = time.perf_counter() - began
            hits = hit_rate(OneRecRecommender(model, start.catalogue.item_codes), start.cases)
            point = points.setdefault(name, {
                "size": name, "parameters": total_parameters(config), "active": active_parameters(config),
                "losses": [], "hits": [], "seconds": 0.0})
            point["losses"].append(losses)
            point["hits"].append(hits)
            point["seconds"] += seconds
            say(f"{name}: {total_parameters(config):,} parameters, test loss {losses[-1]:.4f}, HR@10 {hits.mean():.3f}")
    for point in points.values():
        hits = np.concatenate(point.pop("hits"))
        point |= {"test_loss": np.array(point.pop("losses")).mean(axis=0).tolist(), "hr@10": float(hits.mean()),
                  "hr_error": float(hits.std(ddof=1) / len(hits) ** 0.5)}
    return {"figure": "scaling", "ground": msgspec.to_builtins(ground), "passes": passes, "seeds": seeds, "cases": count,
            "points": list(points.values())}


def _grown(model: OneRec, start: Start, passes: int) -> tuple[OneRec, list[float]]:
    """The model after `passes` over the seed's windows, and its test loss after each."""
    losses: list[float] = []
    learn(
        model, start.examples, start.catalogue.item_codes, passes=passes, learning_rate=start.ground.learning_rate,
        batch_windows=start.ground.batch_windows, after=lambda done, loss: losses.append(_test_loss(model, start)),
    )
    return model, losses


@torch.no_grad()
def _test_loss(model: OneRec, start: Start) -> float:
    """Nats a code over the cases' targets."""
    batch = window_batch(of_cases(start.cases), start.catalogue.item_codes, m=model.config.session_items)
    return float(model.loss(batch)[1]["ntp"])


def draw_scaling(record: dict[str, Any], path: Path) -> None:
    """Loss and hit rate by parameters."""
    pyplot = pyplot_agg()
    points = record["points"]
    sizes = [point["parameters"] for point in points]
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4))
    for done in range(record["passes"]):
        axes[0].plot(sizes, [point["test_loss"][done] for point in points], marker="o",
                     color=pyplot.cm.Reds((done + 1) / record["passes"]), label=f"after pass {done + 1}")
    axes[0].set_ylabel("test loss, nats a code")
    axes[0].legend(frameon=False, fontsize=8)
    axes[1].errorbar(sizes, [point["hr@10"] for point in points], yerr=[point["hr_error"] for point in points],
                     marker="o", capsize=3, color="tab:red")
    axes[1].set_ylabel("HR@10 of the next item (bar: standard error)")
    for axis in axes:
        axis.set_xscale("log")
        axis.set_xlabel("parameters")
        axis.margins(x=0.12, y=0.12)
    for point in points:
        axes[1].annotate(point["size"], (point["parameters"], point["hr@10"]), textcoords="offset points", xytext=(0, -14),
                         ha="center", fontsize=8)
    _finish(figure, axes, f"Larger models, the same windows ({record['cases']} cases of the day after)", path)


def table_scaling(record: dict[str, Any]) -> str:
    """Sizes as Markdown."""
    rows = ["| size | parameters | active | test loss by pass, nats a code | HR@10 | training, s |",
            "|---|---:|---:|---|---:|---:|"]
    rows += [
        f"| {point['size']} | {point['parameters']:,} | {point['active']:,} | "
        f"{' / '.join(f'{loss:.4f}' for loss in point['test_loss'])} | {point['hr@10']:.3f} ± {point['hr_error']:.3f} | "
        f"{point['seconds']:.0f} |"
        for point in record["points"]
    ]
    return "\n".join(rows)


def _finish(figure: Any, axes: Any, title: str, path: Path) -> None:
    for axis in np.ravel(axes):
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=11)
    figure.tight_layout(rect=(0, 0.06 if figure.legends else 0, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot_agg().close(figure)


FIGURE_OF: dict[str, tuple[Callable[..., dict[str, Any]], Callable[[dict[str, Any], Path], None],
                           Callable[[dict[str, Any]], str]]] = {
    "r-dpo": (r_dpo, draw_r_dpo, table_r_dpo),
    "codes": (codes, draw_codes, table_codes),
    "scaling": (scaling, draw_scaling, table_scaling),
}


def main() -> None:
    """Measure, write JSON and plot, print the table."""
    parser = parser_of(__doc__)
    parser.add_argument("figure", choices=list(FIGURE_OF))
    options = parser.parse_args()
    torch.set_num_threads(1)
    measure, draw, table = FIGURE_OF[options.figure]
    with tempfile.TemporaryDirectory() as temporary:
        record = measure(QUICK if options.quick else FULL, options.seeds, options.work or Path(temporary), teller())
    out = options.out or FIGURES
    write_json(out / f"{options.figure}.json", record)
    draw(record, out / f"{options.figure}.png")
    print(table(record))
    if options.out is None:
        put_between(DOCUMENT, f"benchmarks.figures {options.figure}", table(record))


if __name__ == "__main__":
    main()
