"""Vectors and semantic IDs from files: every form is read alike, every fault is named with file, place and item."""

from __future__ import annotations

import json

import numpy as np
import polars as pl
import pytest

from onerec.errors import UserError
from trainer.code_files import load_codes
from trainer.side_features import features_of, fit_side_model, side_only_model
from trainer.vectors import check_vector, encode_text, load_vectors

IDS = ["a", "7", "é"]
VECTORS = np.array([[0.5, -1.0], [2.0, 0.25], [0.0, 3.0]], np.float32)


def write_vectors(folder, kind):
    path = folder / f"vectors.{kind}"
    if kind == "npy":
        np.save(path, VECTORS)
        (folder / "vectors.ids.txt").write_text("\n".join(IDS) + "\n", encoding="utf-8")
    elif kind == "parquet":
        pl.DataFrame({"item_id": IDS, "embedding": VECTORS.tolist(), "more": [1, 2, 3]}).write_parquet(path)
    else:
        lines = (json.dumps({"item_id": item, "embedding": vector}) for item, vector
                 in zip(IDS, VECTORS.tolist(), strict=True))
        path.write_text("\ufeff" + "\n\n".join(lines), encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", ["npy", "parquet", "jsonl"])
def test_every_form_of_vectors_reads_alike(tmp_path, kind):
    table = load_vectors(write_vectors(tmp_path, kind))
    assert table.item_ids == IDS
    assert table.vectors.dtype == np.float32 and np.array_equal(table.vectors, VECTORS)


@pytest.mark.parametrize(("line", "told"), [
    ('{"item_id":"b","embedding":[1.0]}', "1 numbers, those before it have 2"),
    ('{"item_id":"b","embedding":[1.0,null]}', r"embedding\[1\] is nan"),
    ('{"item_id":"b","embedding":[1.0,1e99]}', r"embedding\[1\] is inf"),
    ('{"item_id":"b","embedding":["x","y"]}', "not a list of numbers"),
    ('{"item_id":"b","embedding":[[1.0,2.0]]}', "shape"),
    ('{"item_id":"b","embedding":[]}', "shape"),
    ('{"item_id":"b"}', "has no vector"),
    ('{"item_id":"b","embedding":null}', "has no vector"),
    ('{"item_id":"a","embedding":[1.0,2.0]}', "stands in line 1 too"),
    ('{"item_id":"","embedding":[1.0,2.0]}', "1 to 256 bytes"),
    ('{"item_id":true,"embedding":[1.0,2.0]}', "1 to 256 bytes"),
    ('{"embedding":[1.0,2.0]}', "no item_id"),
    ('[1.0]', "no JSON object"),
    ('{"item_id":"b",', "not JSON"),
])
def test_a_bad_line_of_vectors_is_named(tmp_path, line, told):
    path = tmp_path / "vectors.jsonl"
    path.write_text('{"item_id":"a","embedding":[1.0,2.0]}\n' + line + "\n")
    with pytest.raises(UserError, match=told) as raised:
        load_vectors(path)
    assert str(path) in str(raised.value) and "line 2" in str(raised.value)


def test_a_bad_row_of_an_array_is_named_with_its_item(tmp_path):
    path = write_vectors(tmp_path, "npy")
    np.save(path, np.where(np.arange(6).reshape(3, 2) == 3, np.nan, VECTORS))
    with pytest.raises(UserError, match=r"row 2, item '7'.*embedding\[1\] is nan"):
        load_vectors(path)


def test_an_array_and_its_ids_must_be_as_many(tmp_path):
    path = write_vectors(tmp_path, "npy")
    ids = tmp_path / "vectors.ids.txt"
    ids.write_text("a\n7\né\nextra\n")
    with pytest.raises(UserError, match="'extra' has no vector"):
        load_vectors(path)
    ids.write_text("a\n7\n")
    with pytest.raises(UserError, match="3 rows.*names 2 items"):
        load_vectors(path)
    ids.unlink()
    with pytest.raises(UserError, match="vectors.ids.txt; put the item ids there"):
        load_vectors(path)


@pytest.mark.parametrize("array", [np.zeros(3), np.array([["a"]]), np.array([[1j]]), np.array([[{}]], object)])
def test_an_array_that_is_no_table_of_numbers_is_refused(tmp_path, array):
    path = write_vectors(tmp_path, "npy")
    np.save(path, array)
    with pytest.raises(UserError, match=r"vectors\.npy"):
        load_vectors(path)


@pytest.mark.parametrize("name", ["vectors.npy", "vectors.parquet", "vectors.jsonl"])
def test_missing_empty_and_unreadable_files_are_told(tmp_path, name):
    path = tmp_path / name
    with pytest.raises(UserError, match="no such file"):
        load_vectors(path)
    for data in (b"", b"\x00\xff\xfe garbage"):
        path.write_bytes(data)
        with pytest.raises(UserError, match=name):
            load_vectors(path)


def test_a_missing_column_is_named_with_those_there(tmp_path):
    path = tmp_path / "vectors.parquet"
    pl.DataFrame({"item_id": ["a"], "vec": [[1.0]]}).write_parquet(path)
    with pytest.raises(UserError, match="`embedding` is missing; it has item_id, vec"):
        load_vectors(path)


def test_a_vector_of_the_wrong_length_names_both_lengths():
    with pytest.raises(UserError, match="place: the embedding has 2 numbers, those before it have 3"):
        check_vector([1.0, 2.0], 3, "place")


@pytest.mark.parametrize("kind", ["csv", "parquet", "jsonl"])
def test_texts_of_every_form_reach_the_encoder(tmp_path, kind):
    path = tmp_path / f"texts.{kind}"
    frame = pl.DataFrame({"item_id": ["1", "2"], "title": ["hello", None]})
    {"csv": frame.write_csv, "parquet": frame.write_parquet, "jsonl": frame.write_ndjson}[kind](path)
    heard = []

    def encoder(texts):
        heard.extend(texts)
        return np.array([[len(text), 1.0] for text in texts], np.float32)

    table = encode_text(path, "title", model="none", encoder=encoder)
    assert heard == ["hello", ""]
    assert table.item_ids == ["1", "2"] and table.vectors.tolist() == [[5.0, 1.0], [0.0, 1.0]]
    with pytest.raises(UserError, match="no 'caption'|`caption` is missing"):
        encode_text(path, "caption", model="none", encoder=encoder)


def test_a_missing_text_encoder_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sentence_transformers", None)
    path = tmp_path / "texts.csv"
    path.write_text("item_id,title\n1,hello\n")
    with pytest.raises(UserError, match=r"pip install 'onerec-stream\[text\]'"):
        encode_text(path, "title", model="any")


CODES = {"a": [0, 5, 2], "7": [1, 0, 2], "é": [0, 5, 2]}


def write_codes(folder, name):
    path = folder / name
    if name.endswith(".json"):
        path.write_text(json.dumps(CODES))
    elif name.endswith(".jsonl"):
        path.write_text("".join(json.dumps({"item_id": item, "codes": codes}) + "\n" for item, codes in CODES.items()))
    elif name == "columns.csv":
        path.write_text("c1,c2,item_id,c3\n" + "".join(f"{c[0]},{c[1]},{item},{c[2]}\n" for item, c in CODES.items()))
    elif name == "text.csv":
        path.write_text("item_id,codes\n" + "".join(f'{item},"[{c[0]}, {c[1]}, {c[2]}]"\n' for item, c in CODES.items()))
    elif name == "columns.parquet":
        pl.DataFrame({"item_id": list(CODES), **{f"c{n}": [c[n] for c in CODES.values()] for n in range(3)}}
                     ).write_parquet(path)
    else:
        pl.DataFrame({"item_id": list(CODES), "codes": list(CODES.values())}).write_parquet(path)
    return path


@pytest.mark.parametrize("name", ["codes.json", "codes.jsonl", "columns.csv", "text.csv", "columns.parquet",
                                  "codes.parquet"])
def test_every_form_of_codes_reads_alike(tmp_path, name):
    table = load_codes(write_codes(tmp_path, name), None)
    assert dict(zip(table.item_ids, table.codes_NL.tolist(), strict=True)) == CODES
    assert table.codes_NL.dtype == np.int32


@pytest.mark.parametrize(("name", "text", "told"), [
    ("c.jsonl", '{"item_id":"a","codes":[1,2]}\n{"item_id":"b","codes":[1]}\n', "line 2, item 'b': 1 codes"),
    ("c.jsonl", '{"item_id":"a","codes":[1,-2]}\n', "line 1, item 'a': code -2 is outside 0…"),
    ("c.jsonl", '{"item_id":"a","codes":[1,9]}\n', "code 9 is outside 0…8.*raise catalogue.codes"),
    ("c.jsonl", '{"item_id":"a","codes":[1,1.5]}\n', "line 1.*whole numbers"),
    ("c.jsonl", '{"item_id":"a","codes":[true]}\n', "whole numbers"),
    ("c.jsonl", '{"item_id":"a"}\n', "line 1 has no item_id or no codes"),
    ("c.jsonl", '{"item_id":"a","codes":[1]}\n\n{"item_id":"a","codes":[2]}\n', "line 3: item 'a' stands in line 1 too"),
    ("c.json", '{"a":[1],"a":[2]}', "entry 2: item 'a' stands in entry 1 too"),
    ("c.json", '{"a":[1],\n"b":}', "line 2 is not JSON"),
    ("c.json", "[1,2]", "not JSON: one object"),
    ("c.json", "{}", "is empty"),
    ("c.csv", "item_id,c1\na,1\nb,x\n", "line 3, item 'b': codes are 'x'"),
    ("c.csv", "item_id,c1\na,1\nb,1,2\n", "line 3: 3 fields, the header has 2"),
    ("c.csv", "id,c1\na,1\n", "line 1: columns id, c1"),
    ("c.csv", "", r"columns \(none\)"),
])
def test_a_bad_code_is_named_with_its_place(tmp_path, name, text, told):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(UserError, match=told) as raised:
        load_codes(path, 9)
    assert str(path) in str(raised.value)


def test_side_features_find_the_map_they_came_from():
    rng = np.random.default_rng(0)
    truth = {name: rng.normal(size=3) for name in [f"tag:{n}" for n in range(4)] + [f"author:{n}" for n in range(3)]}
    features = [features_of([str(n % 4)], str(n % 3), None) for n in range(600)]
    vectors = np.stack([1.0 + sum(truth[name] for name in names) for names in features])
    model = fit_side_model(features, vectors, np.ones(600))
    assert np.allclose(model.vector(["tag:1", "author:2"]), 1.0 + truth["tag:1"] + truth["author:2"], atol=0.1)
    assert np.allclose(model.vector(["tag:new"]), model.vector([]))


def test_an_item_that_counts_more_pulls_the_map_to_itself():
    features = [["tag:a"], ["tag:a"]] * 20 + [["tag:b"]] * 20
    vectors = np.array([[0.0], [1.0]] * 20 + [[5.0]] * 20)
    weights = np.array([1.0, 9.0] * 20 + [1.0] * 20)
    assert abs(fit_side_model(features, vectors, weights).vector(["tag:a"])[0] - 0.9) < 0.1


def test_without_behaviour_items_of_like_features_lie_together():
    features = [features_of([f"{n % 3}"], f"{n % 6}", None) for n in range(60)]
    model = side_only_model(features, 8, 0)
    vectors = np.stack([model.vector(names) for names in features])
    distance = ((vectors[:, None] - vectors) ** 2).sum(axis=2)
    same = np.equal.outer(np.arange(60) % 3, np.arange(60) % 3)
    assert distance[same].mean() < 0.5 * distance[~same].mean()
