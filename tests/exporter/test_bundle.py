"""A bundle comes back as it was written, and anything else is refused with the file's name."""

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from serving_helpers import MODEL, REWARD, FakeCatalogue, as_format_1, make_bundle

from exporter import bundle
from exporter.trie import build_trie
from onerec.commands.serve import container_command
from onerec.errors import UserError
from serving_config.recommend.engine import Engine
from trainer.config import RewardConfig


def test_a_sealed_bundle_is_accepted(tmp_path: Path) -> None:
    manifest = make_bundle(tmp_path / "1", 1)
    assert bundle.verify_bundle(tmp_path / "1") == manifest
    assert {"graph/model.onnx", "catalogue.npz", "tags.json", "model.py"} <= manifest.files.keys()


def test_one_changed_byte_in_any_file_is_refused_by_name(tmp_path: Path) -> None:
    names = [*make_bundle(tmp_path / "1", reward=RewardConfig()).files, bundle.MANIFEST_FILE]
    assert {"reward/model.onnx", "reward/model.cpu.onnx"} <= set(names)
    for name in names:
        path = tmp_path / "1" / name
        content = path.read_bytes()
        if not content:
            continue
        place = len(content) // 2
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(UserError, match=Path(name).name):
            bundle.verify_bundle(tmp_path / "1")
        path.write_bytes(content)
    bundle.verify_bundle(tmp_path / "1")


@pytest.mark.parametrize("name", ["graph/model.onnx", "catalogue.npz", "manifest.json", "model.py"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    make_bundle(tmp_path / "1")
    (tmp_path / "1" / name).unlink()
    with pytest.raises(UserError, match=name):
        bundle.verify_bundle(tmp_path / "1")


def test_another_format_is_told_apart_from_damage(tmp_path: Path) -> None:
    make_bundle(tmp_path / "1")
    path = tmp_path / "1" / bundle.MANIFEST_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))
    with pytest.raises(UserError, match="format 99"):
        bundle.read_manifest(tmp_path / "1")


def test_a_version_of_the_format_without_reward_models_is_still_read(tmp_path: Path) -> None:
    manifest = make_bundle(tmp_path / "1")
    as_format_1(tmp_path / "1")
    assert bundle.verify_bundle(tmp_path / "1") == msgspec.structs.replace(manifest, format=1)
    assert not Engine(tmp_path / "1").has_rewards


@pytest.mark.parametrize("change", [{"levels": 2}, {"codes": 16}, {"session_items": 2}])
def test_a_reward_model_of_other_codes_is_refused(change: dict[str, int]) -> None:
    bundle.check_reward(REWARD, MODEL)
    with pytest.raises(UserError, match="mixed versions: the reward model reads"):
        bundle.check_reward(msgspec.structs.replace(REWARD, **change), MODEL)


@given(
    st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=30, unique=True).filter(
        lambda ids: all(text.encode("utf-8", "ignore").decode() == text for text in ids)
    ),
    st.integers(0, 2**32 - 1),
)
def test_trie_item_ids_and_codes_come_back(tmp_path_factory: pytest.TempPathFactory, ids: list[str], seed: int) -> None:
    folder = tmp_path_factory.mktemp("catalogue")
    codes = np.random.default_rng(seed).integers(0, 3, (len(ids), 3), dtype=np.int32)

    class Catalogue(FakeCatalogue):
        item_codes = codes  # type: ignore[assignment]

    bundle.write_catalogue(folder, Catalogue(item_ids=ids, tags=[[text] for text in ids]), MODEL.codes)
    snapshot = bundle.read_catalogue(folder)
    assert snapshot.item_ids == ids
    assert np.array_equal(snapshot.item_codes, codes)
    assert bundle.read_tags(folder) == [[text] for text in ids]
    expected = build_trie(codes, MODEL.codes)
    for name, array in expected.arrays().items():
        assert np.array_equal(snapshot.trie.arrays()[name], array), name
    for leaf in range(expected.leaves):
        assert np.array_equal(snapshot.trie.leaf_items(leaf), expected.leaf_items(leaf))


def test_weights_of_one_codebook_are_refused_with_the_catalogue_of_another(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="mixed versions.*book-2.*book-1"):
        bundle.check_codebooks("book-2", "book-1")
    manifest = make_bundle(tmp_path / "1")
    bundle.write_manifest(tmp_path / "1", msgspec.structs.replace(manifest, codebook_version="book-2"))
    with pytest.raises(UserError, match="different codebooks"):
        Engine(tmp_path / "1")


def test_the_copied_modules_serve_without_the_installed_ones(tmp_path: Path) -> None:
    make_bundle(tmp_path / "1", reward=RewardConfig())
    script = f"""
import sys
from pathlib import Path
sys.path[:] = [p for p in sys.path if "site-packages" not in p] + [{str(tmp_path / "1" / "lib")!r}]
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
sys.path.append({sysconfig.get_path("purelib")!r})
from serving_config.recommend.engine import Engine
from serving_config.recommend.histories import Histories
from serving_config.recommend.service import Request, Service
import streaming.store
import numpy as np
service = Service(Engine(Path({str(tmp_path / "1")!r})), Histories(None))
[answer], _ = service.answer([Request(history=np.array([[b"v3"]], dtype=object),
                                       select=np.array([[b"reward"]], dtype=object))])
assert answer.items.shape == (1, 1, 3), answer
own = {{name: module.__file__ for name, module in sys.modules.items()
       if name.split(".")[0] in ("onerec", "streaming", "trainer", "exporter", "serving_config")}}
assert own and all(str(path).startswith({str(tmp_path)!r}) for path in own.values()), own
assert "torch" not in sys.modules and "onnx" not in sys.modules
"""
    subprocess.run([sys.executable, "-I", "-c", script], check=True, timeout=60)


def test_the_container_line_installs_what_the_copied_modules_import() -> None:
    imported = {name.split(".")[0] for path in bundle.runtime_modules().values() for name in bundle.imported(path)}
    foreign = imported - set(sys.stdlib_module_names) - set(bundle.PROJECT_PACKAGES)
    in_the_image = {"numpy"}
    line = container_command(Path("repository"), Path("state"))
    assert {name for name in foreign - in_the_image if name not in line} == set()
    assert {"onnxruntime", "rocksdict", "msgspec"} <= foreign
    assert "/state:/state -e ONEREC_STATE=/state" in line and "/repository:/repository" in line
