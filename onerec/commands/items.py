"""`onerec items`: build the catalogue, judge its codebook, list its items."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from onerec.console import ConfigOption, JsonOption, SetOption, StateOption, err, out, print_json
from onerec.errors import UserError

if TYPE_CHECKING:
    from trainer.codebook_report import Quality
    from trainer.items import Catalogue

NAMES = {"greedy": "balanced, greedy", "deferred": "balanced, deferred", "plain": "plain k-means",
         "loaded": "made elsewhere"}


def items(
    state: StateOption,
    build: Annotated[bool, typer.Option("--build", help="Fit a new codebook although there is one.")] = False,
    vectors: Annotated[
        Path | None,
        typer.Option(help="Item vectors: .npy (ids one a line in NAME.ids.txt), .parquet or JSON lines with "
                          "item_id and embedding.", show_default=False),
    ] = None,
    codes_file: Annotated[
        Path | None,
        typer.Option(help="Semantic IDs made elsewhere, kept as they are: JSON, JSON lines, CSV or Parquet.",
                     show_default=False),
    ] = None,
    text_column: Annotated[
        str | None,
        typer.Option(help="Encode the texts of this column of --vectors (Parquet, CSV, JSON lines) instead.",
                     show_default=False),
    ] = None,
    until: Annotated[
        int | None,
        typer.Option(help="Event time in ms after which nothing is used; later items come in as new ones.",
                     show_default=False),
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Fit all three methods, set them side by side.")] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Picture of loads, error and neighbours.", show_default=False)
    ] = None,
    list_items: Annotated[bool, typer.Option("--list", help="One line an item: item_id, codes, tags.")] = False,
    json: JsonOption = False,
    config: ConfigOption = None,
    set_: SetOption = None,
) -> None:
    """Show the catalogue and how good its semantic IDs are; build it where there is none.

    Vectors are given, else come from item events, else are learnt from behaviour and side features.
    Judge the codes here before training on them: loads should be even, neighbours should share prefixes far more
    often than any two items do, and few tuples should be shared.

    Example: `onerec items --state state --compare --plot codebook.png`
    """
    from onerec.config import explicit_settings, load_config
    from streaming.store import Reader
    from trainer.catalogue_files import current_version
    from trainer.items import build_catalogue, refresh_catalogue

    settings = load_config(config, set_)
    present = current_version(state)
    building = build or present is None
    given = {"--vectors": vectors, "--codes-file": codes_file, "--text-column": text_column, "--until": until}
    unused = [name for name, value in given.items() if value is not None]
    if unused and not building:
        raise UserError(f"{unused[0]} only counts when a codebook is built, and {state} has one ({present}); "
                        "add --build to replace it")
    if not building and explicit_settings(None, set_).get("catalogue"):
        err.print(f"onerec: settings of the catalogue only count with --build; shown is {present}", style="yellow")
    with Reader(state) as reader:
        if building:
            with err.status("catalogue") as status:
                catalogue = build_catalogue(
                    state, reader, settings, vectors=vectors, codes_file=codes_file, text_column=text_column,
                    until=until, progress=lambda step: status.update(f"catalogue: {step}"))
        else:
            catalogue = refresh_catalogue(state, reader)
    if building and present not in (None, catalogue.version):
        err.print(f"onerec: codebook {present} is replaced by {catalogue.version}; a model trained on the old one "
                  "needs a new run", style="yellow")
    if list_items:
        _print_list(catalogue, json)
        return
    qualities = _qualities(catalogue, settings.catalogue, compare)
    if plot is not None:
        from trainer.codebook_report import plot as draw

        draw(qualities, plot)
    if json:
        print_json(_report(catalogue, qualities))
    else:
        _print_report(catalogue, qualities)
        if plot is not None:
            out.print(f"picture: {plot}")


def register(app: typer.Typer) -> None:
    """Add `items` to the application."""
    app.command("items")(items)


def _qualities(catalogue: Catalogue, settings: Any, compare: bool) -> dict[str, Quality]:
    """The catalogue's own quality first, under its method; with `compare` the other methods on the same vectors."""
    import numpy as np

    from trainer.codebook_report import compare as fit_all
    from trainer.codebook_report import measure

    vectors = catalogue.vectors()
    own = measure(catalogue.item_codes, catalogue.fitted, catalogue.codes, vectors_nd=vectors, errors=catalogue.errors)
    qualities = {catalogue.method: own}
    if compare:
        if vectors is None:
            raise UserError("--compare needs vectors, and this catalogue's codes came without; build it with --vectors")
        rows = np.isfinite(vectors).all(axis=1) & catalogue.fitted[: len(vectors)]
        with err.status("comparing") as status:
            others = fit_all(vectors[rows], levels=catalogue.levels, codes=catalogue.codes,
                             settings=settings, progress=status.update)
        qualities |= {name: quality for name, quality in others.items() if name != catalogue.method}
    return qualities


def _report(catalogue: Catalogue, qualities: dict[str, Quality]) -> dict[str, Any]:
    own = qualities[catalogue.method]
    return {
        "items": len(catalogue.item_ids),
        "levels": catalogue.levels,
        "codes": catalogue.codes,
        "load_min": own.load_min,
        "load_max": own.load_max,
        "new_items": int((~catalogue.fitted).sum()),
        "shared_triples": own.shared,
        "reconstruction_error": own.errors,
        **_figures(own),
        "version": catalogue.version,
        "revision": catalogue.revision,
        "method": catalogue.method,
        "vectors": catalogue.space,
        "vectors_from": catalogue.origins,
        "left_out": catalogue.left_out,
        "compare": {name: {"load_min": quality.load_min, "load_max": quality.load_max,
                           "shared_triples": quality.shared, "reconstruction_error": quality.errors,
                           **_figures(quality)}
                    for name, quality in qualities.items()} if len(qualities) > 1 else None,
    }


def _figures(quality: Quality) -> dict[str, Any]:
    return {
        "load_std": quality.load_std,
        "entropy": quality.entropy,
        "used_codes": quality.used_codes,
        "distinct_triples": quality.distinct,
        "items_sharing": quality.sharing,
        "longest_list": quality.longest,
        "neighbour_prefix": quality.neighbours,
        "random_prefix": quality.chance,
    }


def _print_report(catalogue: Catalogue, qualities: dict[str, Quality]) -> None:
    from rich.table import Table

    new = int((~catalogue.fitted).sum())
    out.print(f"[bold]{len(catalogue.item_ids):,} items[/], {new:,} of them new since the fit; "
              f"{catalogue.levels} levels of {catalogue.codes:,} codes; codebook [bold]{catalogue.version}[/]")
    if catalogue.origins:
        sources = {"own": "given or from item events", "behaviour": "behaviour", "side": "side features",
                   "mean": "none of these (the mean)"}
        shown = (f"{sources[name]}: {count:,}" for name, count in catalogue.origins.items())
        out.print("vectors from " + ", ".join(shown))
    if catalogue.left_out:
        out.print(f"[yellow]left out, with nothing to go by: {len(catalogue.left_out):,} items[/] "
                  f"({', '.join(catalogue.left_out[:5])}); send them with tags, author or embedding")
    table = Table(show_edge=False)
    table.add_column("")
    for name in qualities:
        table.add_column(NAMES[name] + (" (in force)" if name == catalogue.method and len(qualities) > 1 else ""),
                         justify="right")
    for label, values in _rows(list(qualities.values()), catalogue.levels):
        table.add_row(label, *values)
    out.print(table)


def _rows(qualities: list[Quality], levels: int) -> list[tuple[str, list[str]]]:
    rows: list[tuple[str, list[str]]] = []
    for level in range(levels):
        rows.append((f"level {level + 1}: items a code, least … most (std)",
                     [f"{q.load_min[level]} … {q.load_max[level]} ({q.load_std[level]:.2f})" for q in qualities]))
        rows.append((f"level {level + 1}: evenness (entropy, 1 is best)",
                     [f"{q.entropy[level]:.4f}" for q in qualities]))
        rows.append((f"level {level + 1}: error left",
                     [f"{q.errors[level]:.4f}" if q.errors else "no data" for q in qualities]))
    rows.append(("distinct tuples", [f"{q.distinct:,}" for q in qualities]))
    rows.append(("tuples of several items", [f"{q.shared:,}" for q in qualities]))
    rows.append(("items in them (longest list)", [f"{q.sharing:,} ({q.longest})" for q in qualities]))
    for level in range(levels):
        rows.append((f"neighbours with {level + 1} equal code{'s' if level else ''} (any two items)",
                     [f"{q.neighbours[level]:.2%} ({q.chance[level]:.3%})" if q.neighbours else "no data"
                      for q in qualities]))
    return rows


def _print_list(catalogue: Catalogue, json: bool) -> None:
    import orjson

    lines = []
    for item_id, codes, tags in zip(catalogue.item_ids, catalogue.item_codes.tolist(), catalogue.tags, strict=True):
        if json:
            lines.append(orjson.dumps({"item_id": item_id, "codes": codes, "tags": tags}))
        else:
            lines.append(f"{item_id}\t{' '.join(map(str, codes))}\t{','.join(tags)}".encode())
    sys.stdout.buffer.write(b"".join(line + b"\n" for line in lines))
    sys.stdout.buffer.flush()
