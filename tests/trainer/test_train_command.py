"""`onerec train` as a user calls it, and the picture it draws."""

from pathlib import Path

import msgspec
import orjson
import pytest
import typer
from test_loop import SETTINGS, records, session, write
from typer.testing import CliRunner

from onerec.commands import train as command
from onerec.errors import UserError
from trainer.curves import draw


@pytest.fixture(autouse=True)
def _small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    from trainer import presets

    monkeypatch.setitem(presets.PRESETS, "tiny", msgspec.structs.replace(
        presets.PRESETS["tiny"], d_model=32, heads=2, d_ff=32, encoder_layers=1, decoder_layers=1, experts=2))


@pytest.fixture
def app() -> typer.Typer:
    app = typer.Typer()
    command.register(app)
    app.command()(lambda: None)
    return app


def options(state: Path, run: Path, *more: str) -> list[str]:
    settings = [part for setting in SETTINGS for part in ("--set", setting)]
    return ["train", "--state", str(state), "--run", str(run), *settings, *more]


def test_it_builds_the_catalogue_trains_reports_and_draws(app: typer.Typer, tmp_path: Path) -> None:
    write(tmp_path / "state", [session(i) for i in range(40)], records())
    call = options(tmp_path / "state", tmp_path / "run", "--plot", str(tmp_path / "curve.png"))
    result = CliRunner().invoke(app, call, catch_exceptions=False)
    assert "no catalogue yet" in result.output
    assert "40 sessions" in result.output and "hit rate@10" in result.output and "covisitation" in result.output
    assert (tmp_path / "curve.png").read_bytes()[:4] == b"\x89PNG"
    again = CliRunner().invoke(app, [*call, "--json"], catch_exceptions=False)
    summary = orjson.loads(again.stdout.splitlines()[-1])
    assert summary["sessions"] == 40 and summary["new_sessions"] == 0
    assert summary["scores"].keys() == {"onerec", "popularity", "covisitation"}


def test_a_preset_of_another_size_is_refused_on_an_old_run(app: typer.Typer, tmp_path: Path) -> None:
    write(tmp_path / "state", [session(i) for i in range(10)], records())
    CliRunner().invoke(app, options(tmp_path / "state", tmp_path / "run"), catch_exceptions=False)
    with pytest.raises(UserError, match="train.preset=tiny, not small"):
        CliRunner().invoke(
            app, options(tmp_path / "state", tmp_path / "run", "--preset", "small"), catch_exceptions=False
        )


@pytest.mark.parametrize("bad", ["--preset=huge", "--plot=/no/such/folder/x.png"])
def test_bad_options_change_nothing(app: typer.Typer, tmp_path: Path, bad: str) -> None:
    write(tmp_path / "state", [session(i) for i in range(10)], records())
    with pytest.raises(UserError, match=r"tiny|make it first"):
        CliRunner().invoke(app, options(tmp_path / "state", tmp_path / "run", bad), catch_exceptions=False)
    assert not (tmp_path / "run" / "run.json").exists()


def test_nothing_learnt_draws_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="learnt nothing"):
        draw([], tmp_path / "x.png")
