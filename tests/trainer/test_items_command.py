"""`onerec items` as a user meets it: what it prints, what it refuses, and what it leaves alone."""

from __future__ import annotations

import json

import pytest
import typer
from typer.testing import CliRunner

from onerec.commands import items as command
from onerec.errors import UserError
from streaming.items import ItemRecord
from streaming.semantics import Semantics
from streaming.store import Store

KEYS = ["items", "levels", "codes", "load_min", "load_max", "new_items", "shared_triples", "reconstruction_error"]


@pytest.fixture
def state(tmp_path):
    folder = tmp_path / "state"
    with Store(folder, Semantics()) as store:
        store.put_items([ItemRecord(item_id=f"i{n}", ts=1_700_000_000_000, tags=[f"t{n % 7}"], author_id=f"a{n % 13}",
                                    duration_ms=1000 * n + 1) for n in range(90)])
        store.sync()
    return folder


def onerec(*arguments):
    """Output of `onerec items …`; errors of ours come through as themselves."""
    app = typer.Typer()
    app.callback()(lambda: None)
    command.register(app)
    result = CliRunner().invoke(app, ["items", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_first_call_builds_and_reports_the_agreed_keys_in_order(state):
    report = json.loads(onerec("--state", state, "--json", "--set", "catalogue.codes=8"))
    assert list(report)[: len(KEYS)] == KEYS
    assert {key: report[key] for key in KEYS[:6]} == {
        "items": 90, "levels": 3, "codes": 8, "load_min": [11] * 3, "load_max": [12] * 3, "new_items": 0}
    assert report["reconstruction_error"] == sorted(report["reconstruction_error"], reverse=True)
    assert report["method"] == "deferred" and report["vectors"] == "learnt"


def test_later_calls_show_what_is_there_and_count_new_items(state):
    first = json.loads(onerec("--state", state, "--json"))
    with Store(state, Semantics()) as store:
        store.put_items([ItemRecord(item_id="new", ts=1_700_000_000_000, tags=["t1"])])
        store.sync()
    report = json.loads(onerec("--state", state, "--json"))
    assert report["version"] == first["version"]
    assert (report["items"], report["new_items"]) == (91, 1)
    assert (report["load_min"], report["load_max"]) == (first["load_min"], first["load_max"])


def test_the_list_has_one_line_an_item(state):
    onerec("--state", state)
    lines = [json.loads(line) for line in onerec("--state", state, "--list", "--json").splitlines()]
    assert len(lines) == 90 and all(list(line) == ["item_id", "codes", "tags"] for line in lines)
    by_id = {line["item_id"]: line for line in lines}
    assert by_id["i9"]["tags"] == ["t2"] and len(by_id["i9"]["codes"]) == 3
    text = onerec("--state", state, "--list").splitlines()
    assert f"i9\t{' '.join(map(str, by_id['i9']['codes']))}\tt2" in text


def test_the_comparison_sets_three_methods_side_by_side_with_a_picture(state, tmp_path):
    picture = tmp_path / "codebook.png"
    text = onerec("--state", state, "--compare", "--plot", picture, "--set", "catalogue.codes=8")
    assert "plain k-means" in text and "in force" in text
    assert picture.read_bytes().startswith(b"\x89PNG")
    report = json.loads(onerec("--state", state, "--compare", "--json"))
    assert set(report["compare"]) == {"greedy", "deferred", "plain"}
    assert report["compare"]["deferred"]["reconstruction_error"] == report["reconstruction_error"]
    assert report["compare"]["greedy"]["load_max"] == [12] * 3


def test_files_for_a_build_are_not_taken_in_silence_where_nothing_is_built(state, tmp_path):
    onerec("--state", state)
    path = tmp_path / "codes.json"
    path.write_text(json.dumps({f"i{n}": [n % 3, n % 4] for n in range(90)}))
    with pytest.raises(UserError, match="--codes-file.*--build"):
        onerec("--state", state, "--codes-file", path)
    report = json.loads(onerec("--state", state, "--codes-file", path, "--build", "--json"))
    assert (report["levels"], report["codes"], report["method"]) == (2, 4, "loaded")
    assert report["shared_triples"] == 12


def test_texts_need_the_file_that_holds_them(state):
    with pytest.raises(UserError, match="--vectors"):
        onerec("--state", state, "--text-column", "title")


def test_codes_without_vectors_have_no_error_and_cannot_be_compared(tmp_path):
    Store(tmp_path / "state", Semantics()).close()
    path = tmp_path / "codes.json"
    path.write_text(json.dumps({"a": [0, 1], "b": [1, 1], "c": [1, 1]}))
    report = json.loads(onerec("--state", tmp_path / "state", "--codes-file", path, "--json"))
    assert report["reconstruction_error"] is None and report["shared_triples"] == 1
    assert "no data" in onerec("--state", tmp_path / "state")
    with pytest.raises(UserError, match="--compare needs vectors"):
        onerec("--state", tmp_path / "state", "--compare")


def test_a_folder_without_a_state_is_refused_with_the_remedy(tmp_path):
    with pytest.raises(UserError, match="replay"):
        onerec("--state", tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
