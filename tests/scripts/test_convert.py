"""The convert command: a directory that loads, and one sentence for every mistake."""

import functools
import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from decoding.drafters.registry import build, load_drafter
from decoding.trees import MC_SIM_7B_63
from models import load_target
from models.formats.hf import load_config, load_params, save_target
from models.formats.llama2c import read_llama2c
from models.formats.storage import leaves_by_path
from models.formats.target import Target
from scripts.convert import main
from tests.models.formats import released_cases as cases
from tests.models.formats.sentencepiece_models import model as sentencepiece_model
from tests.models.formats.test_llama2c import (
    CHARACTERS,
    TEXT,
    WORDS,
    pieces_of,
    random_weights,
    write_tokenizer,
    write_v0,
    write_v2,
)

WORDS_300 = [*WORDS, *CHARACTERS, *(f"w{i}" for i in range(300 - 259 - len(WORDS) - len(CHARACTERS)))]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_v0(tmp_path / "model.bin", random_weights(), tied=True)
    write_v2(tmp_path / "q8.bin", random_weights(), tied=True)
    write_tokenizer(tmp_path / "tok.bin", pieces_of(WORDS_300))
    return tmp_path


def convert(folder: Path, src: str = "model.bin", tokenizer: str | None = "tok.bin", *more: str) -> None:
    extra = ["--tokenizer", str(folder / tokenizer)] if tokenizer else []
    main(["--from", "llama2c", "--src", str(folder / src), "--out", str(folder / "out"), *extra, *more])


def test_converts(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert(source)
    assert "2 layers, width 16, vocabulary 300\n" in capsys.readouterr().out
    target = load_target(source / "out")
    direct = Target(*read_llama2c(source / "model.bin"))
    np.testing.assert_allclose(target.apply([TEXT]).logits, direct.apply([TEXT]).logits, atol=1e-5)
    assert target.tokenizer is not None and target.tokenizer.decode(target.tokenizer.encode("the aba")) == "the aba"
    convert(source, "q8.bin", "tok.bin", "--overwrite")
    rounded = load_target(source / "out")
    assert 0 < np.abs(rounded.apply([TEXT]).logits - direct.apply([TEXT]).logits).max() < 1


def test_converts_gguf(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gguf")
    from tests.models.formats.test_gguf import golden, write_model

    config, params = golden("qwen3")
    command = ["--from", "gguf", "--src", str(write_model(tmp_path / "m.gguf", config, params))]
    main([*command, "--out", str(tmp_path / "out")])
    assert "qwen3, 3 layers, width 16, vocabulary 40" in capsys.readouterr().out
    assert load_config(tmp_path / "out") == config
    jax.tree.map(np.testing.assert_array_equal, load_params(config, tmp_path / "out"), params)
    with pytest.raises(SystemExit):
        main([*command, "--out", str(tmp_path / "again"), "--tokenizer", "t.bin"])
    assert "no use for --tokenizer" in capsys.readouterr().err


def test_mistakes_are_one_sentence(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def complaint(*arguments: str | None) -> str:
        before = sorted(p.name for p in source.iterdir())
        with pytest.raises(SystemExit) as caught:
            convert(source, *arguments)
        assert caught.value.code == 2
        assert sorted(p.name for p in source.iterdir()) == before
        message = capsys.readouterr().err
        assert message.startswith("error: ") and message.count("\n") == 1
        return message

    assert "no checkpoint file" in complaint("nowhere.bin")
    assert "no tokenizer file" in complaint("model.bin", "nowhere.bin")
    assert "--from llama2c needs --tokenizer" in complaint("model.bin", None)
    (source / "m.gguf").write_bytes(b"GGUF\x03" + bytes(60))
    assert "m.gguf is a GGUF file, not a checkpoint of llama2.c" in complaint("m.gguf")
    assert "not a llama2.c checkpoint" in complaint("tok.bin")
    assert "needs --tokenizer" in complaint("model.bin", None)
    (source / "tok.model").write_bytes(sentencepiece_model())
    assert f"not llama2.c's own: give {source / 'tok.bin'}" in complaint("model.bin", "tok.model")
    (source / "other.model").write_bytes(sentencepiece_model())
    assert "give the .bin that its tokenizer.py exports" in complaint("model.bin", "other.model")
    (source / "short.bin").write_bytes((source / "model.bin").read_bytes()[:-4])
    assert "truncated" in complaint("short.bin")
    convert(source)
    assert "--overwrite" in complaint()


def test_runs_as_a_command(source: Path) -> None:
    command = [sys.executable, "-m", "scripts.convert", "--from", "llama2c", "--src", str(source / "nowhere.bin")]
    done = subprocess.run([*command, "--out", str(source / "out")], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr


def test_unknown_format_lists_the_known(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--from", "ggml", "--src", "x", "--out", "y"])
    assert "llama2c" in capsys.readouterr().err


# Released drafters


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("target") / "base"
    made = cases.random_base()
    save_target(directory, made.config, made.params)
    return directory


def convert_drafter(kind: str, src: Path, base: Path, out: Path, *more: str) -> dict[str, Any]:
    """Runs the command; returns the new `drafter.json`."""
    main(["--from", kind, "--src", str(src), "--base", str(base), "--out", str(out), *more])
    return json.loads((out / "drafter.json").read_text())


def releases(base: Path, folder: Path) -> dict[str, Path]:
    """One release of each kind, as file or directory."""
    target = load_target(base)
    return {
        "medusa": cases.write(folder / "medusa" / "medusa_lm_head.pt", cases.medusa(heads=5)).parent,
        "hydra": cases.write(folder / "hydra" / "hydra_lm_head.pt", cases.hydra(target)).parent,
        "eagle": cases.write(folder / "eagle" / "pytorch_model.bin", cases.eagle(target), cases.EAGLE_CONFIG).parent,
        "eagle3": cases.write(folder / "eagle3" / "model.safetensors", cases.eagle3(cases.DRAFT_TOKENS)),
    }


@pytest.mark.parametrize(
    ("kind", "format", "detected"),
    [
        ("medusa", "medusa v0.1", {"vocabulary_maps": "of the heads"}),
        ("hydra", "hydra++", {"dropout_layout": True, "tied_blocks": True}),
        ("eagle", "eagle", {"fc_bias": True, "rope": "as config.json says"}),
        (
            "eagle3",
            "eagle3",
            {"draft_vocabulary": 12, "layers": [2, 3, 4], "rope": "of the base; there is no config.json"},
        ),
    ],
)
def test_released_drafters_load(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, format: str, detected: dict
) -> None:
    source = releases(base, tmp_path)[kind]
    record = convert_drafter(kind, source, base, tmp_path / "out")
    told = capsys.readouterr().out
    assert f"wrote {tmp_path / 'out'}: {format} for {base}, from " in told and "None" not in told
    assert ("could not be checked" in told) == (kind in ("medusa", "eagle3"))
    assert ("it reads what enters the layers 2,3,4 of the base (the original release's" in told) == (kind == "eagle3")
    assert record["method"] == kind and record["provenance"]["format"] == format
    assert record["provenance"]["detected"] == detected
    files = sorted(path.name for path in (source.iterdir() if source.is_dir() else [source]))
    assert sorted(record["provenance"]["files"]) == files
    assert str(tmp_path) not in json.dumps(record)
    target = load_target(base)
    drafter, params = load_drafter(tmp_path / "out", target)
    assert build(record, "here") == drafter
    written = load_file(tmp_path / "out" / "model.safetensors")
    shapes = jax.eval_shape(functools.partial(drafter.init_params, target.config), target.params, jax.random.key(0))
    of_file = [written[path.replace("/", ".")] for path in leaves_by_path(shapes)]
    assert len(of_file) == len(written)
    expected = drafter.for_decoding(jax.tree.unflatten(jax.tree.structure(shapes), of_file))
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_tensors_keep_their_bits(base: Path, tmp_path: Path) -> None:
    tensors = cases.bfloat16(cases.medusa())
    convert_drafter("medusa", cases.write(tmp_path / "m.pt", tensors), base, tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert len(written) == len(tensors)
    assert written["heads.2.vocab.kernel"].dtype == tensors["2.1.weight"].dtype
    np.testing.assert_array_equal(written["heads.2.vocab.kernel"], tensors["2.1.weight"].T)
    np.testing.assert_array_equal(written["heads.1.blocks.0.linear.bias"], tensors["1.0.linear.bias"])


def test_the_tree_reaches_as_far_as_the_heads(base: Path, tmp_path: Path) -> None:
    def tree(heads: int) -> list[list[int]]:
        source = cases.write(tmp_path / f"m{heads}.pt", cases.medusa(heads=heads))
        return convert_drafter("medusa", source, base, tmp_path / f"out{heads}")["tree"]

    assert tree(5) == tree(4) == [list(path) for path in MC_SIM_7B_63.paths]
    assert tree(2) == [list(path) for path in MC_SIM_7B_63.paths if len(path) <= 2]


def test_norms_of_eagle31(base: Path, tmp_path: Path) -> None:
    config = cases.EAGLE_CONFIG | {"fc_norm": True, "norm_output": True}
    source = cases.write(tmp_path / "e" / "model.safetensors", cases.eagle31(), config).parent
    record = convert_drafter("eagle31", source, base, tmp_path / "out", "--norm_output", "fed_back")
    assert record["method"] == "eagle3" and record["provenance"]["format"] == "eagle3.1"
    drafter, _ = load_drafter(tmp_path / "out", load_target(base))
    assert drafter.heads.fc_norm and drafter.heads.norm_output and not drafter.heads.norm_before_residual


def test_p_eagle(base: Path, tmp_path: Path) -> None:
    config = cases.EAGLE_CONFIG | {"num_hidden_layers": 3, "mask_token_id": 5}
    source = cases.write(tmp_path / "e" / "model.safetensors", cases.p_eagle(load_target(base)), config).parent
    record = convert_drafter("p_eagle", source, base, tmp_path / "out", "--policy", "static:tree=chain:5,draws=without")
    assert record["method"] == record["provenance"]["format"] == "p_eagle"
    drafter, params = load_drafter(tmp_path / "out", load_target(base))
    assert drafter.max_depth == 5 and drafter.heads.num_layers == 3 and len(params["blocks"]) == 2


def test_layers_of_eagle3(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = cases.write(tmp_path / "e.safetensors", cases.eagle3(None))
    record = convert_drafter("eagle3", source, base, tmp_path / "out", "--layers", "0,2,6")
    assert "it reads what enters the layers 0,2,6 of the base (the given)" in capsys.readouterr().out
    assert [record["heads"][name] for name in ("low", "middle", "high")] == [0, 2, 6]


class Runs:
    """Pickles into a call of the shell."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_wrong_releases_leave_nothing(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = releases(base, tmp_path)
    capsys.readouterr()

    def complaint(kind: str, src: Path, *more: str, out: str = "out", on: Path | None = base) -> str:
        before = sorted(tmp_path.rglob("*"))
        arguments = ["--from", kind, "--src", str(src), "--out", str(tmp_path / out), *more]
        with pytest.raises(SystemExit) as caught:
            main(arguments + (["--base", str(on)] if on else []))
        assert caught.value.code == 2
        assert sorted(tmp_path.rglob("*")) == before
        message = capsys.readouterr().err
        assert message.startswith("error: ") and message.count("\n") == 1
        return message

    with zipfile.ZipFile(tmp_path / "evil.pt", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"0.0.linear.weight": Runs(f"touch {tmp_path}/marker")}, 2))
    assert f"{os.system.__module__}.system" in complaint("medusa", tmp_path / "evil.pt")
    assert not (tmp_path / "marker").exists()
    with zipfile.ZipFile(tmp_path / "photos.pt", "w") as archive:
        archive.writestr("holiday.jpg", b"x")
    assert "is a zip archive, but not one that torch wrote: it holds holiday.jpg" in complaint(
        "medusa", tmp_path / "photos.pt"
    )
    assert "there is no released file" in complaint("hydra", tmp_path / "nowhere")
    assert "holds no Medusa head" in complaint("medusa", good["eagle"])
    assert "config.json" in complaint("medusa", good["medusa"], on=tmp_path)
    assert "needs --base" in complaint("eagle", good["eagle"], on=None)
    assert "has no use for --base" in complaint("llama2c", good["eagle"])
    assert "has no use for --tokenizer" in complaint("eagle", good["eagle"], "--tokenizer", "t.bin")
    assert "has no use for --layers" in complaint("eagle", good["eagle"], "--layers", "1,2,3")
    assert "has no use for --norm_output" in complaint("eagle3", good["eagle3"], "--norm_output", "head")
    assert "reads what enters layer 9" in complaint("eagle3", good["eagle3"], "--layers", "1,2,9")
    assert "--overwrite" in complaint("eagle", good["eagle"], out="medusa")
    assert "holds no drafter.json" in complaint("eagle", good["eagle"], "--overwrite", out="medusa")
    with pytest.raises(SystemExit):
        main(["--from", "eagle3", "--src", "x", "--base", "y", "--out", "z", "--layers", "1,2"])
    assert "--layers must be three numbers with commas between them, got" in capsys.readouterr().err
