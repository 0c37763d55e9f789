"""Commands and streams whose texts have latents beside them."""

import pathlib

import jax
import pytest

from decoding.augment import Augment
from decoding.coprocessors import save_coprocessor
from decoding.generate import generate
from eval import main as benchmark
from models import coprocessor
from models.coprocessor import CoprocessorConfig
from models.formats.continuation import text_behind
from models.formats.target import Target
from scripts import generate as command
from tests.noise import noisy

EVERY, NEW = 4, 12


@pytest.fixture(scope="module")
def directory(target: Target, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A random coprocessor."""
    config = CoprocessorConfig("lora", num_latents=2, rank=2)
    init = jax.jit(coprocessor.init_params, static_argnums=(0, 1))
    params = noisy(init(config, target.config, target.params, jax.random.key(1)), 0.3)
    made = tmp_path_factory.mktemp("augmented") / "coprocessor"
    save_coprocessor(made, config, params, target.fingerprint())
    return made


def test_a_text_that_ends_at_a_point_has_no_latents_behind_it(target: Target, directory: pathlib.Path) -> None:
    augment = Augment.load(directory, target, EVERY)
    assert target.tokenizer is not None
    cut = 0
    for text in ("def f(x):", "once upon", "a small house", "return x"):
        prompt = target.tokenizer.encode(text)
        (new,) = generate(target, [prompt], max_new_tokens=NEW, augment=augment).tokens
        said = [text_behind(target.tokenizer, prompt, new[:count]) for count in range(NEW + 1)]
        for point in (EVERY, 2 * EVERY):
            whole, stop = said[point], said[point][-2:]
            # The host looks again where the loop stops; half a character is none yet.
            if not stop.isascii() or whole.find(stop) != len(whole) - 2 or len(said[point - 1]) == len(whole):
                continue
            made = generate(target, [prompt], max_new_tokens=NEW, augment=augment, stop_texts=[stop])
            assert made.tokens == [new[:point]] and made.augmentations == [point // EVERY]
            cut += 1
    assert cut, "a text that ends nowhere proves nothing"


def test_commands_say_what_latents_did(
    target: Target, directory: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--target", str(target.path), "--augment", str(directory), "--augment_every", str(EVERY)]
    command.main([*where, "--prompt", "def f(x):", "--max_new_tokens", str(NEW), "--no-color"])
    last = capsys.readouterr().out.splitlines()[-1]
    assert "latents 3 times" in last and last.endswith(" ms")
    options = dict(augment=str(directory), augment_every=EVERY, max_new_tokens=NEW, num_prompts=1, repeats=1)
    config = benchmark.DecodeConfig(
        str(target.path), drafters="none", parts=False, out=str(tmp_path / "out"), **options
    )
    results = benchmark.run(config)
    (run,) = results["augmented"]["runs"]
    assert run["augmentations"] == 3 and run["augmentation_ms"] > 0
    assert "with 2 latents (lora)" in capsys.readouterr().out
