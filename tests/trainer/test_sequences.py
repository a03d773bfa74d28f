"""Imported sequences, and the leave-one-out table made of them."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from onerec.cli import build
from onerec.errors import UserError
from trainer.leave_one_out import METHODS, Settings, check_methods, features_of, measure, scores
from trainer.sequences import Dataset, import_sequences, load, read_sequences, save

LINES = "ann a b c d\nbob b c a\n\ncid c\ndan a b\neve d c b a\n"


def write(folder: Path, text: str = LINES, name: str = "log.txt") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def names(dataset: Dataset, rows: list[int]) -> str:
    return "".join(dataset.items[row] for row in rows)


def small(folder: Path) -> Dataset:
    return import_sequences(write(folder), levels=2, size=2)


def test_last_item_is_the_test_and_the_one_before_validation(tmp_path: Path) -> None:
    dataset = small(tmp_path)
    assert dataset.users == ["ann", "bob", "cid", "dan", "eve"] and dataset.items == ["a", "b", "c", "d"]
    assert [names(dataset, row) for row in dataset.training()] == ["ab", "b", "c", "ab", "dc"]
    held, test = dataset.validation(), dataset.test()
    assert [names(dataset, row) for row in held.histories] == ["ab", "b", "dc"]
    assert names(dataset, held.targets) == "ccb"
    assert [names(dataset, row) for row in test.histories] == ["abc", "bc", "dcb"]
    assert names(dataset, test.targets) == "daa"
    counts = dataset.counts()
    assert (counts["users"], counts["tested_users"], counts["training_only_users"]) == (5, 3, 2)
    assert (counts["interactions"], counts["items_never_in_training"]) == (14, 0)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("ann a b c\nbob\n", "line 2: user 'bob' has no item"),
        ("ann a b c\n\nbob a\nann d\n", "line 4: user 'ann' stands in line 1 too"),
        ("ann a b c\nbob " + "x" * 257 + "\n", "line 2: item_id is"),
        ("ann a b\nbob a\n", "no user of 2 has 3 items"),
        ("", "no user of 0 has 3 items"),
    ],
)
def test_a_fault_names_its_line(tmp_path: Path, text: str, fault: str) -> None:
    with pytest.raises(UserError, match=fault):
        read_sequences(write(tmp_path, text))


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    path.write_bytes(b"ann a b c\nbob \xff b\n")
    with pytest.raises(UserError, match=r"line 2 is not UTF-8 \(byte 5\)"):
        read_sequences(path)
    with pytest.raises(UserError, match="no such file"):
        read_sequences(tmp_path / "other.txt")


def test_no_validation_or_test_item_has_a_say_in_the_semantic_ids(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    heads = [[f"i{item}" for item in rng.integers(0, 40, 8)] for _ in range(60)]
    every = " ".join(f"i{item}" for item in range(40))

    def imported(seed: int, name: str) -> Dataset:
        tails = np.random.default_rng(seed).integers(0, 40, (60, 2))
        lines = [f"u{n} {' '.join(head)} i{a} i{b}" for n, (head, (a, b)) in enumerate(zip(heads, tails, strict=True))]
        return import_sequences(write(tmp_path, "\n".join([*lines, f"all {every} i0 i1"]), name), levels=3, size=8)

    one, other = imported(1, "one.txt"), imported(2, "other.txt")
    assert any((a != b).any() for a, b in zip(one.sequences, other.sequences, strict=True))
    assert (one.item_codes == other.item_codes).all()
    assert len(np.unique(one.item_codes[:, 0])) == 8


def test_given_semantic_ids_of_any_shape_are_taken(tmp_path: Path) -> None:
    given = {"d": [9, 1], "a": [0, 0], "b": [0, 1], "c": [3, 0], "unused": [1, 1]}
    codes = write(tmp_path, json.dumps(given), "codes.json")
    dataset = import_sequences(write(tmp_path), codes_file=codes)
    assert dataset.item_codes.tolist() == [[0, 0], [0, 1], [3, 0], [9, 1]]
    assert (dataset.codes, dataset.made) == (10, False)
    assert import_sequences(write(tmp_path), codes_file=codes, size=256).codes == 256
    with pytest.raises(UserError, match="item 'd'"):
        import_sequences(write(tmp_path), codes_file=codes, size=4)
    del given["c"]
    with pytest.raises(UserError, match="1 of the 4 items have no semantic ID, first 'c'"):
        import_sequences(write(tmp_path), codes_file=write(tmp_path, json.dumps(given), "codes.json"))


def test_features_become_categories_beside_the_code_of_level_1(tmp_path: Path) -> None:
    given = write(tmp_path, json.dumps({"a": ["x", None], "b": ["y", 3], "d": ["x", 3]}), "features.json")
    dataset = import_sequences(write(tmp_path), features_file=given, levels=2, size=2)
    assert dataset.features.tolist() == [[0, -1], [1, 0], [-1, -1], [0, 0]]
    assert features_of(dataset)[:, 0].tolist() == dataset.item_codes[:, 0].tolist()
    for text, fault in (('{"a": ["x"], "b": []}', "item 'b' has 0 values"), ("[1]", "a list of values"), ("{", "not JSON")):
        with pytest.raises(UserError, match=fault):
            import_sequences(write(tmp_path), features_file=write(tmp_path, text, "features.json"))


def test_a_data_set_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    dataset, folder = small(tmp_path), tmp_path / "made" / "set"
    save(dataset, folder)
    back = load(folder)
    assert [row.tolist() for row in back.sequences] == [row.tolist() for row in dataset.sequences]
    assert back.item_codes.tolist() == dataset.item_codes.tolist()
    assert (back.users, back.items, back.codes, back.source) == (dataset.users, dataset.items, 2, "log.txt")
    with pytest.raises(UserError, match="exists already"):
        save(dataset, folder)


def test_a_folder_that_is_no_sound_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no imported sequences"):
        load(tmp_path)
    save(small(tmp_path), tmp_path / "set")
    described = tmp_path / "set" / "dataset.json"
    text = described.read_text()
    described.write_text(text.replace('"format_version":1', '"format_version":9'))
    with pytest.raises(UserError, match="version 9"):
        load(tmp_path / "set")
    described.write_text(text)
    arrays = tmp_path / "set" / "arrays.npz"
    arrays.write_bytes(arrays.read_bytes()[:-1] + b"?")
    with pytest.raises(UserError, match="is damaged"):
        load(tmp_path / "set")
    described.write_text(text[:40])
    with pytest.raises(UserError, match="cannot be read"):
        load(tmp_path / "set")


def test_scores_of_known_places() -> None:
    found = scores(np.array([1.0, 3.0, 6.0, 11.0, math.inf]))
    assert found == pytest.approx(
        {"hr5": 0.4, "hr10": 0.6, "ndcg5": (1 + 0.5) / 5, "ndcg10": (1 + 0.5 + 1 / math.log2(7)) / 5}
    )


def test_popularity_is_measured_as_by_hand(tmp_path: Path) -> None:
    # Training: ab, b, c, ab, dc: b 3, a 2, c 2, d 1. Test items d, a, a: places 4, 2, 2.
    score = measure(small(tmp_path), "popularity", 0, Settings())
    assert (score.hr5, score.hr10, score.users, score.epochs) == (1.0, 1.0, 3, None)
    assert score.ndcg5 == pytest.approx((1 / math.log2(5) + 2 / math.log2(3)) / 3)


def test_covisitation_asks_popularity_where_nothing_followed(tmp_path: Path) -> None:
    # After c nothing followed in training, after b neither; popularity decides: the same places as by hand above.
    score = measure(small(tmp_path), "co-visitation", 0, Settings())
    assert score.ndcg5 == pytest.approx((1 / math.log2(5) + 2 / math.log2(3)) / 3)


def test_levels_of_codes_that_are_given_are_refused(tmp_path: Path) -> None:
    path = str(write(tmp_path))
    result = CliRunner().invoke(build(), ["import", "sequences", path, "--out", path + ".d", "--codes", path, "--levels", "2"])
    assert isinstance(result.exception, UserError) and "--levels and --codes" in str(result.exception)


def test_an_unknown_method_is_named() -> None:
    with pytest.raises(UserError, match="--methods tigre: no such method; choose of popularity"):
        check_methods(["popularity", "tigre"])


def test_every_method_runs_from_a_file_to_json_lines(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lines = []
    for user in range(40):
        start, length = int(rng.integers(8)), int(rng.integers(2, 7))
        lines.append(f"u{user} " + " ".join(f"i{(start + step) % 8}" for step in range(length)))
    runner, app = CliRunner(), build()
    made = runner.invoke(
        app, ["import", "sequences", str(write(tmp_path, "\n".join(lines))), "--out", str(tmp_path / "set"), "--levels", "2",
              "--size", "4", "--json"],
    )
    assert made.exit_code == 0, made.output
    assert json.loads(made.stdout)["items"] == 8
    words = ["leave-one-out", str(tmp_path / "set"), "--epochs", "1", "--length", "8", "--threads", "1"]
    result = runner.invoke(app, [*words, "--json"])
    assert result.exit_code == 0, result.output
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["method"] for line in found] == list(METHODS)
    for line in found:
        assert {"seed", "hr@5", "hr@10", "ndcg@5", "ndcg@10", "seconds", "epochs"} <= line.keys()
        assert 0 <= line["ndcg@5"] <= line["ndcg@10"] <= line["hr@10"] <= 1 and line["hr@5"] <= line["hr@10"]
    assert {line["method"]: line["hr@10"] for line in found}["co-visitation"] == 1.0
    table = runner.invoke(app, [*words, "--methods", "popularity,sasrec-ce", "--seeds", "2"])
    assert table.exit_code == 0 and "±" in table.stdout and "SASRec (CE)" in table.stdout
