"""`onerec import sequences` and `onerec leave-one-out`: files of item sequences, as published tables use them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from onerec.console import JsonOption, err, out, print_json
from onerec.errors import UserError

if TYPE_CHECKING:
    from trainer.baselines.fitting import Epoch
    from trainer.leave_one_out import Score


def register(app: typer.Typer) -> None:
    """Add both commands to `app`."""
    group = typer.Typer(no_args_is_help=True, help="Read data made elsewhere.")

    @group.callback()
    def imports() -> None:
        """Read data made elsewhere."""

    group.command("sequences")(sequences)
    app.add_typer(group, name="import")
    app.command("leave-one-out")(leave_one_out)


def sequences(
    file: Annotated[Path, typer.Argument(help="Lines `user item item …`, oldest item first.", show_default=False)],
    folder: Annotated[Path, typer.Option("--out", help="New folder for the data set.", show_default=False)],
    codes: Annotated[
        Path | None, typer.Option(help='Semantic IDs `{"item": [3, 17, 5], …}`; without, they are made.', show_default=False)
    ] = None,
    features: Annotated[
        Path | None, typer.Option(help='Categories for FDSA, `{"item": ["author", "tag"], …}`.', show_default=False)
    ] = None,
    levels: Annotated[
        int | None, typer.Option(min=1, help="Levels of the semantic IDs that are made; default 3.", show_default=False)
    ] = None,
    size: Annotated[
        int | None, typer.Option(min=1, help="Codes a level; default by the number of items.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the semantic IDs that are made.")] = 0,
    json: JsonOption = False,
) -> None:
    """Import item sequences for a leave-one-out table: last item test, the one before validation.

    Only the order matters, no times. Users with fewer than three items are learnt from and not tested.

    Example: `onerec import sequences beauty.txt --out beauty --levels 3 --size 256`
    """
    from trainer.sequences import import_sequences, save

    if codes is not None and levels is not None:
        raise UserError("--levels and --codes: given codes have their own levels; leave one of the two out")
    if folder.exists():
        raise UserError(f"--out {folder} exists already; name a new folder or remove that one")
    dataset = import_sequences(
        file, codes_file=codes, features_file=features, levels=levels or 3, size=size, seed=seed,
        say=lambda text: None if json else err.print(text, highlight=False),
    )
    save(dataset, folder)
    counts = dataset.counts()
    if json:
        print_json({"out": str(folder), "made": dataset.made, **counts})
        return
    out.print(
        f"{counts['users']:,} users, {counts['items']:,} items, {counts['interactions']:,} interactions; "
        f"{counts['tested_users']:,} users are tested, {counts['training_only_users']:,} have fewer than three items and are "
        f"only learnt from; {counts['items_never_in_training']:,} items occur in no training part",
        highlight=False,
    )
    out.print(
        f"semantic IDs {'made from the training part' if dataset.made else 'given'}: {counts['levels']} levels of "
        f"{counts['codes']:,} codes, {counts['semantic_ids']:,} different; "
        f"{counts['items_sharing_an_id']:,} items share theirs",
        highlight=False,
    )
    out.print(f"next: onerec leave-one-out {folder}", highlight=False)


def leave_one_out(
    folder: Annotated[Path, typer.Argument(help="Folder of `onerec import sequences`.", show_default=False)],
    methods: Annotated[
        str | None, typer.Option(help="Some of the methods, with commas between; default all.", show_default=False)
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds, for mean ± deviation.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="The first seed.")] = 0,
    preset: Annotated[str, typer.Option(help="Size of TIGER and OneRec: tiny, small, 0.1B, 1B.")] = "tiny",
    length: Annotated[int, typer.Option(min=1, help="Newest items of a history that a method sees.")] = 50,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Most epochs; early stopping ends sooner.", show_default=False)
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of the training.")] = 2,
    json: JsonOption = False,
) -> None:
    """Train every method on imported sequences and rank each user's last item among all items.

    Hit rate and NDCG at 5 and 10, full ranking, nothing filtered out. With --json one line a method and seed.

    Example: `onerec leave-one-out beauty --methods sasrec-ce,tiger --seeds 3`
    """
    import torch

    from trainer.leave_one_out import METHODS, Settings, check_methods, measure
    from trainer.presets import preset as known_preset
    from trainer.sequences import load

    chosen = [name.strip() for name in methods.split(",")] if methods is not None else list(METHODS)
    check_methods(chosen)
    known_preset(preset)
    dataset = load(folder)
    torch.set_num_threads(threads)
    settings = Settings(preset=preset, length=length, epochs=epochs)
    found: list[Score] = []
    with _reporting(quiet=json, total=len(chosen) * seeds) as report:
        for name in chosen:
            for number in range(seed, seed + seeds):
                heard = report(f"{METHODS[name]}, seed {number}")
                score = measure(dataset, name, number, settings, heard)
                found.append(score)
                if json:
                    print_json(msgspec.to_builtins(score))
    if not json:
        _print_table(found, dataset.source)


@contextmanager
def _reporting(*, quiet: bool, total: int) -> Iterator[Any]:
    """Gives a function that begins a method and returns what hears its epochs; on standard error."""
    if quiet or not err.is_terminal:

        def plain(name: str) -> Any:
            if not quiet:
                err.print(name, highlight=False)
            return lambda epoch: None

        yield plain
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    with Progress(BarColumn(bar_width=24), TextColumn("{task.description}"), TimeElapsedColumn(), console=err) as bar:
        task = bar.add_task("reading", total=total)
        begun = [0]

        def live(name: str) -> Any:
            bar.update(task, description=name, completed=begun[0])
            begun[0] += 1

            def heard(epoch: Epoch) -> None:
                bar.update(
                    task,
                    description=f"{name}: epoch {epoch.number}, loss {epoch.loss:.3f}, validation NDCG@10 {epoch.ndcg:.4f}",
                )

            return heard

        yield live


def _print_table(found: list[Score], source: str) -> None:
    from rich.table import Table

    from trainer.judge import mean_and_deviation
    from trainer.leave_one_out import METHODS

    seeds = len({score.seed for score in found})
    table = Table(
        title=f"{source}: last item of {found[0].users:,} users, full ranking, {seeds} seed{'s' if seeds > 1 else ''}",
        title_justify="left",
        box=None,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    names = ("hr@5", "hr@10", "ndcg@5", "ndcg@10")
    for column in ("", *names, "epochs", "seconds"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for method in dict.fromkeys(score.method for score in found):
        mine = [msgspec.to_builtins(score) for score in found if score.method == method]
        numbers = [{name: value for name, value in line.items() if isinstance(value, float)} for line in mine]
        values = mean_and_deviation(numbers)
        deviated = (_deviated(*values[name], seeds) for name in names)
        epochs = [line["epochs"] for line in mine if line["epochs"] is not None]
        mean_epochs = f"{sum(epochs) / len(epochs):.0f}" if epochs else "–"
        table.add_row(METHODS[method], *deviated, mean_epochs, f"{values['seconds'][0]:.1f}")
    out.print(table)


def _deviated(mean: float, deviation: float, seeds: int) -> str:
    """`0.1234±.006`; the mean alone for one seed."""
    return f"{mean:.4f}" + (f"±{deviation:.3f}".replace("±0", "±") if seeds > 1 else "")
