"""The convert command on image models: directories that load, and one sentence for every mistake."""

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from models.formats import image_models as files
from models.images.config import SCHEDULES, VARConfig, VQVAEConfig
from scripts.convert import main
from tests.models.formats import image_checkpoints as checkpoints
from tests.models.formats.torch_archives import write_torch

VAR = VARConfig(depth=2, width=8, num_heads=2, num_classes=5, vocab_size=20, latent_channels=4)
VAE = VQVAEConfig(vocab_size=20, latent_channels=4, width=4, multipliers=(1, 2), blocks=1)


@pytest.mark.parametrize("kind", ["var", "code"])
@pytest.mark.parametrize(("option", "scales"), [(None, "256"), ("512", "512"), ("1,2,4", "1,2,4")])
def test_transformers(tmp_path: Path, capsys, kind: str, option: str | None, scales: str) -> None:
    config = dataclasses.replace(VAR, scales=SCHEDULES.get(scales, (1, 2, 4)))
    tensors = checkpoints.var(config, buffers=False)
    source = write_torch(tmp_path / "refiner_8.pth", tensors)
    schedule = ["--schedule", option] if option else []
    main(["--from", kind, "--src", str(source), "--out", str(tmp_path / "out"), *schedule])
    assert f"wrote {tmp_path / 'out'}: {kind}; depth 2, width 8, " in capsys.readouterr().out
    found, params = files.load(tmp_path / "out", VARConfig)
    assert found == config
    np.testing.assert_array_equal(params["head"]["vocab"]["kernel"], tensors["head.weight"].T)
    record = json.loads((tmp_path / "out" / "config.json").read_text())
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    assert record["provenance"] == {"format": kind, "files": {"refiner_8.pth": digest}}


@pytest.mark.parametrize(("option", "scales"), [([], "256"), (["--schedule", "512"], "512")])
def test_tokenizer(tmp_path: Path, option: list[str], scales: str, capsys) -> None:
    tensors = checkpoints.vae(VAE)
    source = write_torch(tmp_path / "vae.pth", tensors)
    main(["--from", "vae", "--src", str(source), "--out", str(tmp_path / "out"), *option])
    told = capsys.readouterr().out
    assert ("nothing in vae.pth tells its scales; those for images of 256 pixels were taken" in told) == (not option)
    found, params = files.load(tmp_path / "out", VQVAEConfig)
    assert found == dataclasses.replace(VAE, scales=SCHEDULES[scales])
    np.testing.assert_array_equal(params["codebook"]["embedding"], tensors["quantize.embedding.weight"])


def test_mistakes_leave_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = write_torch(tmp_path / "var.pth", checkpoints.var(VAR))
    other = write_torch(tmp_path / "vae.pth", checkpoints.vae(VAE))

    def complaint(kind: str, source: Path, *more: str, out: str = "out") -> str:
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as caught:
            main(["--from", kind, "--src", str(source), "--out", str(tmp_path / out), *more])
        assert caught.value.code == 2
        assert sorted(tmp_path.rglob("*")) == before
        return capsys.readouterr().err

    for message, words in (
        (complaint("var", tmp_path / "nowhere.pth"), "there is no file"),
        (complaint("var", other), "holds no VAR transformer"),
        (complaint("vae", good), "holds no VQ-VAE"),
        (complaint("code", good, "--schedule", "512"), "but the schedule 1,2,3,4,6,9,13,18,24,32 has 2240 and 10"),
        (complaint("vae", other, "--schedule", "2,1"), "--schedule must be 256, 512 or two or more rising sides"),
        (complaint("var", good, "--base", "b"), "has no use for --base"),
        (complaint("vae", good, "--tokenizer", "t"), "has no use for --tokenizer"),
        (complaint("llama2c", good, "--schedule", "256"), "--from llama2c has no use for --schedule"),
        (complaint("var", good, out="var.pth"), "--overwrite replaces it"),
    ):
        assert message.startswith("error: ") and message.count("\n") == 1 and words in message
    assert "--schedule must be 256, 512 or two or more rising sides such as 1,2,3, got '1,x'" in complaint(
        "var", good, "--schedule", "1,x"
    )
    main(["--from", "var", "--src", str(good), "--out", str(tmp_path / "out")])
    main(["--from", "var", "--src", str(good), "--out", str(tmp_path / "out"), "--overwrite"])
