"""Arrays beside packed rows: what is read is what was made, from where it was interrupted, and nothing else."""

import json
import shutil
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

from models.errors import UserError
from train.data import features
from train.data.features import Array, FeatureRows, Manifest, read_manifest, write_features
from train.data.texts import Documents, PackedRows

LENGTH, ROWS = 4, 7
ARRAYS = {"x": Array("bfloat16", (LENGTH, 3)), "top": Array("int32", (LENGTH, 2))}
MANIFEST = Manifest(ARRAYS, {"target": "one", "split": "train"}, ROWS)


def made(first: int = 0):
    """Batches of 2 from a row on, the last filled up; of row i all numbers are i, or i plus a fraction."""
    for start in range(first, ROWS, 2):
        number = np.arange(start, start + 2)[:, None, None]
        yield {"x": np.broadcast_to(number + 0.26, (2, LENGTH, 3)), "top": np.broadcast_to(number, (2, LENGTH, 2))}


@pytest.fixture
def rows() -> PackedRows:
    """Seven rows, the last with a padded end."""
    tokens = np.arange(ROWS * LENGTH - 1, dtype=np.int32)
    document = {"name": "a", "tokens": tokens, "mask": np.ones(len(tokens), np.uint8)}
    return PackedRows(Documents(np.array([len(tokens)]), lambda _: document), LENGTH)


@pytest.fixture
def directory(tmp_path, monkeypatch):
    """Features of these rows, in files of two rows each."""
    monkeypatch.setattr(features, "_FILE_BYTES", 2 * MANIFEST.row_size)
    write_features(tmp_path / "made" / "features", MANIFEST, 2, made, print)
    return tmp_path / "made" / "features"


def test_a_row_has_its_tokens_and_its_arrays(directory, rows):
    assert [path.name for path in directory.parent.iterdir()] == ["features"]
    assert len(features.files_in(directory)) == 4 and read_manifest(directory) == MANIFEST
    beside = FeatureRows(rows, directory, ("x", "top"))
    assert len(beside) == ROWS
    for index in (3, 6, 0):
        row = beside[index]
        assert row["tokens"].tolist() == rows[index]["tokens"].tolist()
        assert row["x"].dtype == ml_dtypes.bfloat16 and row["top"].dtype == np.int32
        np.testing.assert_array_equal(row["x"], np.full((LENGTH, 3), index + 0.26).astype(ml_dtypes.bfloat16))
        np.testing.assert_array_equal(row["top"], np.full((LENGTH, 2), index))
        assert {name: (a.shape, a.dtype) for name, a in row.items()} == {
            name: (a.shape, a.dtype) for name, a in beside.padding.items()
        }
    second = FeatureRows(rows, directory, ("top",))[1]
    assert set(second) == {"tokens", "segments", "mask", "top"}
    np.testing.assert_array_equal(second["top"], np.full((LENGTH, 2), 1))
    # Records are what is announced, up to what array_record says of each.
    size = sum(path.stat().st_size for path in features.files_in(directory))
    assert MANIFEST.size == ROWS * LENGTH * (3 * 2 + 2 * 4) and size >= MANIFEST.size


def test_an_interrupted_job_is_continued(directory, rows, tmp_path, capsys):
    def interrupted(first):
        yield from list(made(first))[:2]
        raise KeyboardInterrupt

    again = tmp_path / "again"
    with pytest.raises(KeyboardInterrupt):
        write_features(again, MANIFEST, 2, interrupted, print)
    assert not again.exists()
    with pytest.raises(UserError, match=r"again\.partial holds unfinished features of another job: remove it, or"):
        write_features(again, Manifest(ARRAYS, {}, ROWS), 2, made, print)
    asked = []
    write_features(again, MANIFEST, 2, lambda first: asked.append(first) or made(first), print)
    assert asked == [4] and "4 rows are there" in capsys.readouterr().out
    for path in sorted(directory.iterdir()):
        assert (again / path.name).read_bytes() == path.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "made"]


def test_two_jobs_do_not_write_the_same(directory, tmp_path):
    def meanwhile(first):
        with pytest.raises(UserError, match=r"is in use by another job .*, or choose another data\.features"):
            write_features(tmp_path / "x", MANIFEST, 2, made, print)
        yield from made(first)

    write_features(tmp_path / "x", MANIFEST, 2, meanwhile, print)
    # One that comes when the other has finished keeps what is there.
    write_features(tmp_path / "x", MANIFEST, 2, lambda first: pytest.fail("made again"), print)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "x"]


def test_what_does_not_fit_on_the_disk_is_not_begun(tmp_path, monkeypatch):
    monkeypatch.setattr(features.shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    with pytest.raises(UserError, match=r"the features need 3\.92e-07 GB in .*, whose disk has 1e-07 GB left"):
        write_features(tmp_path / "x", MANIFEST, 2, made, print)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (Manifest(ARRAYS, {"target": "two"}, ROWS), "of another target (one; this job's is two): name another"),
        (Manifest(ARRAYS, {}, 8), "of another number of rows (7; this job's is 8)"),
        (Manifest({"y": ARRAYS["x"]}, {}, ROWS), "has no y, of which this job reads bfloat16[4,3]"),
        (Manifest({"x": Array("bfloat16", (4, 5))}, {}, ROWS), "has bfloat16[4,3] as x, of which this job reads bf"),
    ],
)
def test_features_of_something_else_are_refused(wanted, words, tmp_path):
    with pytest.raises(UserError) as caught:
        MANIFEST.check_holds(wanted, tmp_path)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_part_of_what_is_there_may_be_read(tmp_path):
    MANIFEST.check_holds(Manifest({"top": ARRAYS["top"]}, {"split": "train"}, ROWS), tmp_path)


def test_other_directories_and_damage_get_one_sentence(directory, rows, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "manifest.json").write_text('{"kind": "text"}')
    for path in (tmp_path / "data", tmp_path):
        with pytest.raises(UserError, match=r"exists and holds no features: data\.features must name them"):
            read_manifest(path)
    torn = shutil.copytree(directory, tmp_path / "torn")
    features.files_in(torn)[2].unlink()
    with pytest.raises(UserError, match=r"the features in .*torn are damaged \(they hold 5 rows, not 7\)"):
        FeatureRows(rows, torn, ("x",))
    last = features.files_in(directory)[-1]
    last.write_bytes(last.read_bytes()[:20])
    with pytest.raises(UserError, match=r"the features in .*features are damaged \(") as caught:
        FeatureRows(rows, directory, ("x",))
    assert "\n" not in str(caught.value)
    manifest = json.loads((torn / "manifest.json").read_text())
    (torn / "manifest.json").write_text(json.dumps({**manifest, "arrays": {"x": {"dtype": "int32"}}}))
    with pytest.raises(UserError, match=r"manifest\.json is damaged \(KeyError: 'shape'\)"):
        read_manifest(torn)
