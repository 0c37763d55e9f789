"""Documents on disk, packing against a tape laid out by hand, order, resume, sharding, and the TFDS catalogue."""

import json
import pathlib
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader
from tensorflow_datasets.proto import tf_example_pb2

from models.errors import UserError
from models.formats.tokenizer import Tokenizer
from train.data import texts as data
from train.data.order import in_order, shuffled

LENGTHS = [5, 1, 17, 3, 8, 2, 11, 6]


def make_documents(lengths=LENGTHS, first_token=1) -> list[data.Document]:
    """Documents whose tokens count on through all of them, with every third token no label."""
    starts = np.cumsum([first_token, *lengths])
    return [
        {
            "name": f"document {index}",
            "tokens": np.arange(start, start + length, dtype=np.int32),
            "mask": (np.arange(start, start + length) % 3 != 0).astype(np.uint8),
        }
        for index, (start, length) in enumerate(zip(starts, lengths, strict=False))
    ]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "set"
    path.mkdir()
    splits = {"train": make_documents(), "valid": make_documents([4, 4], 1000)}
    lengths = data.write_splits(path, {name: lambda name=name: splits[name] for name in splits}, "for tests")
    assert lengths["train"].tolist() == LENGTHS and lengths["valid"].tolist() == [4, 4]
    (path / "manifest.json").write_text(json.dumps({"tokenizer": "0123456789abcdef", "kind": "text"}))
    return path


@pytest.fixture
def documents(directory) -> data.Documents:
    return data.open_split(directory, "train")


def same(first, second) -> bool:
    return first.keys() == second.keys() and all(np.array_equal(first[key], second[key]) for key in first)


def test_documents_come_back_in_order(documents):
    assert len(documents) == len(LENGTHS) and documents.manifest["kind"] == "text"
    for stored, written in zip((documents[index] for index in range(len(documents))), make_documents(), strict=True):
        assert stored["name"] == written["name"]
        assert (stored["tokens"].dtype, stored["mask"].dtype) == (np.int32, np.uint8)
        assert np.array_equal(stored["tokens"], written["tokens"]) and np.array_equal(stored["mask"], written["mask"])
    with pytest.raises(IndexError):
        documents[len(documents)]


def test_slices_of_a_split(directory):
    part = data.open_split(directory, "train[2:5]")
    assert part.lengths.tolist() == LENGTHS[2:5] and part[0]["name"] == "document 2"
    assert len(data.open_split(directory, "train[:50%]")) == len(LENGTHS) // 2
    with pytest.raises(UserError, match=r"the part of the split 'train' .* is empty"):
        data.open_split(directory, "train[90%:10%]")


def test_equal_documents_become_equal_bytes(directory):
    reader = ArrayRecordReader(str(next(directory.glob("token_documents-train*"))))
    for record in reader.read_all():
        assert tf_example_pb2.Example.FromString(record).SerializeToString(deterministic=True) == record


@pytest.mark.parametrize("manifest", [{}, {"largest_token": {"train": 53}}])
def test_tokens_without_an_embedding_are_refused(documents, manifest):
    documents.manifest.clear()
    documents.manifest.update(manifest)
    whole = documents.within(54, "the set")
    assert same(whole[7], documents[7]) and len(whole) == len(documents)
    message = r"^the set, document 7 \(document 7\): token 5 is 53, but the model has the embeddings 0 to 52 alone$"
    with pytest.raises(UserError, match=message):
        documents.within(53, "the set")[7]
    if manifest:  # Said before the document is needed.
        with pytest.raises(UserError, match=message):
            documents.within(53, "the set")


def test_tfds_reads_the_directory_by_itself(directory):
    source = tfds.builder_from_directory(str(directory)).as_data_source(split="valid")
    assert [example["tokens"].tolist() for example in source] == [[1000, 1001, 1002, 1003], [1004, 1005, 1006, 1007]]


@pytest.mark.parametrize("seq_len", [2, 4, 7, 53, 60])
def test_rows_are_the_tape_cut_up(documents, seq_len):
    rows = data.PackedRows(documents, seq_len)
    total = sum(LENGTHS)
    assert len(rows) == -(-total // seq_len)
    owner = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    for index in range(len(rows)):
        row = rows[index]
        here = owner[index * seq_len : (index + 1) * seq_len]
        padding = [0] * (seq_len - len(here))
        tokens = np.arange(1 + index * seq_len, 1 + index * seq_len + len(here))
        assert row["tokens"].tolist() == [*tokens, *padding]
        assert row["mask"].tolist() == [*(tokens % 3 != 0), *padding]
        assert row["segments"].tolist() == [*(1 + np.unique(here, return_inverse=True)[1]), *padding]


def test_rows_too_short(documents):
    with pytest.raises(UserError, match="at least 2"):
        data.PackedRows(documents, 1)


def test_every_epoch_holds_every_row_once_in_another_order(documents):
    rows_per_epoch = len(data.PackedRows(documents, 4))
    found = [batch["tokens"][0, 0] for batch in shuffled(data.PackedRows(documents, 4), 1, seed=0, epochs=3)]
    epochs = np.array(found).reshape(3, rows_per_epoch)
    assert all(sorted(epoch) == list(range(1, 54, 4)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    again = [batch["tokens"][0, 0] for batch in shuffled(data.PackedRows(documents, 4), 1, seed=0, epochs=3)]
    other = [batch["tokens"][0, 0] for batch in shuffled(data.PackedRows(documents, 4), 1, seed=1, epochs=3)]
    assert again == found and other != found


def test_batches_have_the_contract_s_shapes(documents):
    batch = next(shuffled(data.PackedRows(documents, 4), 3, seed=0))
    assert {key: (value.shape, value.dtype.name) for key, value in batch.items()} == {
        "tokens": ((3, 4), "int32"),
        "segments": ((3, 4), "int32"),
        "mask": ((3, 4), "uint8"),
    }


@pytest.mark.parametrize("consumed", [0, 1, 9, 40])
def test_resume_is_exact(directory, documents, consumed):
    first = shuffled(data.PackedRows(documents, 4), 3, seed=0)
    for _ in range(consumed):
        next(first)
    state = json.loads(json.dumps(first.get_state()))
    second = shuffled(data.PackedRows(data.open_split(directory, "train"), 4), 3, seed=0)
    second.set_state(state)
    assert all(same(next(first), next(second)) for _ in range(20))


def test_processes_share_out_the_rows_of_every_step(documents):
    alone = shuffled(data.PackedRows(documents, 4), 4, seed=0)
    rows = data.PackedRows(documents, 4)
    parts = [shuffled(rows, 4, seed=0, process_index=index, process_count=2) for index in range(2)]
    for _ in range(12):
        whole = next(alone)["tokens"]
        first, second = (next(part)["tokens"] for part in parts)
        assert np.array_equal(whole[0::2], first) and np.array_equal(whole[1::2], second)
    assert parts[0].get_state() == parts[1].get_state() == alone.get_state()


def test_batch_sizes_that_cannot_be(documents):
    with pytest.raises(UserError, match="multiple of 2"):
        shuffled(data.PackedRows(documents, 4), 3, seed=0, process_count=2)
    with pytest.raises(UserError, match="2 epochs of 14 examples do not fill one batch of 29"):
        shuffled(data.PackedRows(documents, 4), 29, seed=0, epochs=2)


@pytest.mark.parametrize("processes", [1, 2])
def test_one_pass_covers_everything_once(documents, processes):
    parts = [
        list(in_order(data.PackedRows(documents, 4), 4, process_index=index, process_count=processes))
        for index in range(processes)
    ]
    assert {len(part) for part in parts} == {4}
    batches = [batch for part in parts for batch in part]
    assert all(batch["tokens"].shape == (4 // processes, 4) for batch in batches)
    real = np.concatenate([batch["tokens"][batch["segments"] > 0] for batch in batches])
    assert sorted(real) == list(range(1, 54))
    padded = np.concatenate([batch["mask"][batch["segments"] == 0] for batch in batches])
    assert len(padded) == 4 * 4 * 4 - 53 and not padded.any()
    assert len(list(in_order(data.PackedRows(documents, 4), 4, max_batches=2))) == 2


def test_the_tokenizer_is_checked(directory):
    assert len(data.open_split(directory, "train", tokenizer_fingerprint="0123456789abcdef"))
    with pytest.raises(UserError, match=r"tokenised by tokenizer 0123456789abcdef, but the model here uses .* feed"):
        data.open_split(directory, "train", tokenizer_fingerprint="feed")


def test_no_such_data(directory, tmp_path):
    with pytest.raises(UserError, match=r"no data set at .*expected a directory written by"):
        data.open_split(tmp_path / "none", "train")
    with pytest.raises(UserError, match="has no split 'test'; it has train, valid"):
        data.open_split(directory, "test")


def test_nothing_but_the_data_set_is_left(directory):
    names = {path.name.split("-")[0] for path in directory.iterdir()}
    assert names == {"dataset_info.json", "features.json", "lengths", "manifest.json", "token_documents"}


@pytest.mark.parametrize("name", ["lengths-train.npy", "dataset_info.json", "features.json", "token_documents-train"])
def test_a_missing_file_is_named(directory, tmp_path, name):
    copy = pathlib.Path(shutil.copytree(directory, tmp_path / "set"))
    (path,) = copy.glob(f"{name}*")
    path.unlink()
    with pytest.raises(UserError, match=rf"set is incomplete: there is no {path.name}$"):
        data.open_split(copy, "train")
    if "train" in name:
        assert len(data.open_split(copy, "valid")) == 2


@pytest.mark.parametrize("wound", ["cut", "overwritten", "pointer", "garbage"])
@pytest.mark.parametrize("name", ["lengths-train.npy", "dataset_info.json", "features.json", "token_documents-train"])
def test_a_damaged_file_is_one_sentence(directory, tmp_path, name, wound):
    copy = pathlib.Path(shutil.copytree(directory, tmp_path / "set"))
    (path,) = copy.glob(f"{name}*")
    content = path.read_bytes()
    path.write_bytes(
        {
            "cut": content[: len(content) // 2],
            "overwritten": content[:40] + b"\xff" * 300 + content[340:],
            "pointer": b"version https://git-lfs.github.com/spec/v1\n",
            "garbage": b"\0garbage" * 99,
        }[wound]
    )
    with pytest.raises(UserError, match="LFS" if wound == "pointer" else "damaged|not of this data set"):
        documents = data.open_split(copy, "train")
        [documents[index] for index in range(len(documents))]


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        (b"{", "manifest.json is not valid JSON"),
        (b"[]", "manifest.json must hold a JSON object"),
        (b"\xff", "manifest.json is not UTF-8 text"),
        (b"{}", "manifest.json does not say which tokenizer"),
    ],
)
def test_broken_manifests(directory, tmp_path, manifest, message):
    copy = pathlib.Path(shutil.copytree(directory, tmp_path / "set"))
    (copy / "manifest.json").write_bytes(manifest)
    with pytest.raises(UserError, match=message):
        data.open_split(copy, "train")


def test_a_full_disk_is_one_sentence(tmp_path, run_python):
    output = run_python(
        "import pathlib, resource\n"
        "import numpy as np\n"
        "from models.errors import UserError\n"
        "from train.data import order, texts as data\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "tokens = np.random.default_rng(0).integers(0, 2**30, 50_000, np.int32)\n"
        "document = {'name': 'a', 'tokens': tokens, 'mask': np.ones(50_000, np.uint8)}\n"
        "try:\n"
        f"    data.write_splits(pathlib.Path({str(tmp_path)!r}), {{'train': lambda: [document]}}, '')\n"
        "except UserError as error:\n"
        "    print(error)\n"
    )
    assert output == f"could not write the data set in {tmp_path.parent}: File too large\n"


# The catalogue.


class TandemQuestions(tfds.core.GeneratorBasedBuilder):
    """Four questions, registered under the name tandem_questions."""

    VERSION = tfds.core.Version("1.0.0")
    broken = False

    def _info(self):
        features = {
            "question": tfds.features.Text(),
            "answer": tfds.features.Text(),
            "number": tfds.features.Scalar(np.int32),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        if self.broken:
            raise ConnectionError("no route to host\nmore about it")
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for index in range(4):
            yield index, {"question": f"What is {index}?", "answer": f"It is {index}, naïvely.", "number": index}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["What is it? It is."], 258)


def test_catalogue_sets_read_like_directories(tokenizer, tmp_path, capsys):
    documents = data.open_split("tfds:tandem_questions", "train", tokenizer=tokenizer, data_dir=tmp_path)
    texts = {tokenizer.decode(documents[index]["tokens"]) for index in range(len(documents))}
    assert texts == {f"What is {index}?\nIt is {index}, naïvely." for index in range(4)}
    first = documents[0]["tokens"]
    assert (first[0], first[-1], len(first)) == (tokenizer.bos_id, tokenizer.eos_ids[0], documents.lengths[0])
    assert next(shuffled(data.PackedRows(documents, 8), 2, seed=0))["mask"].all()
    answers = data.open_split(
        "tfds:tandem_questions", "train[:2]", tokenizer=tokenizer, fields=("answer",), data_dir=tmp_path
    )
    assert len(answers) == 2 and tokenizer.decode(answers[0]["tokens"]).startswith("It is")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"name_or_dir": "tfds:tandem_question"},
            "TFDS has no data set 'tandem_question'; did you mean 'tandem_questions'",
        ),
        ({"split": "test"}, "has no split 'test'; it has train"),
        ({"fields": ("question", "solution")}, "has no field solution; it holds question, answer, number"),
        ({"fields": ("number",)}, "field 'number' .* not text"),
        ({"tokenizer": None}, "holds text: expected a tokenizer"),
        ({"tokenizer_fingerprint": "feed"}, "but the model here uses tokenizer feed"),
    ],
)
def test_catalogue_requests_that_cannot_be_met(tokenizer, tmp_path, arguments, message):
    defaults = {"name_or_dir": "tfds:tandem_questions", "split": "train", "tokenizer": tokenizer, "data_dir": tmp_path}
    with pytest.raises(UserError, match=message):
        data.open_split(**{**defaults, **arguments})


def test_catalogue_set_that_cannot_be_downloaded(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(TandemQuestions, "broken", True)
    with pytest.raises(UserError) as raised:
        data.open_split("tfds:tandem_questions", "train", tokenizer=tokenizer, data_dir=tmp_path)
    assert "could not be downloaded and prepared here (ConnectionError: no route to host)" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_tensorflow_is_never_imported(directory, run_python):
    run_python(
        "import sys\n"
        "from train.data import order, texts as data\n"
        f"next(order.shuffled(data.PackedRows(data.open_split({str(directory)!r}, 'train'), 4), 2, seed=0))\n"
        "assert 'tensorflow' not in sys.modules\n"
    )
