"""What caches of keys and values must take: the figures of CoDe's table, and which of a pair decides."""

import pytest

from decoding.images.generate import Stage, Tokenizer
from eval.images.memory import ProgramMemory, StageMemory, cache_bytes, peak
from eval.images.speed import var_shape
from models.images.config import VARConfig, VQVAEConfig

MEBIBYTE = 2**20
# Keys in float32 and values in half precision, as the published models run.
PUBLISHED = {"key_bytes": 4, "value_bytes": 2}
TOKENIZER = VQVAEConfig()


def shape(depth: int) -> VARConfig:
    return var_shape(depth, TOKENIZER)


@pytest.mark.parametrize(("depth", "mebibytes"), [(30, 448), (24, 287), (20, 199), (16, 127.5)])
def test_published_models_per_image(depth: int, mebibytes: float) -> None:
    found = cache_bytes(shape(depth), 10, 1, **PUBLISHED)
    assert found / MEBIBYTE == pytest.approx(mebibytes, abs=0.25)
    assert cache_bytes(shape(depth), 10, 1, guided=False, **PUBLISHED) == found / 2
    # By default both are float32.
    assert cache_bytes(shape(depth), 10, 1) == found * 8 / 6


@pytest.mark.parametrize(("depth", "mebibytes"), [(30, 28_687), (16, 8_160)])
def test_published_models_at_batch_64(depth: int, mebibytes: int) -> None:
    assert int(cache_bytes(shape(depth), 10, 64, **PUBLISHED) / MEBIBYTE) == mebibytes


@pytest.mark.parametrize(
    ("n", "drafted", "decides"), [(9, 424, "drafter"), (8, 255, "drafter"), (7, 155, "refiner"), (6, 91, "refiner")]
)
def test_of_a_pair_the_larger_cache_counts(n: int, drafted: int, decides: str) -> None:
    """Depths 30 and 16 at batch 64: the drafter's ends after N scales, and is gone before the refiner's begins."""
    drafter, refiner = cache_bytes(shape(30), n, 64, **PUBLISHED), cache_bytes(shape(16), 10, 64, **PUBLISHED)
    assert drafter == 64 * 2 * 30 * drafted * 1920 * 6 and refiner == 8_160 * MEBIBYTE
    program = ProgramMemory(0, 0, 0, 0)
    parts = [StageMemory(program, drafter), StageMemory(program, refiner)]
    stages = [Stage(shape(30), {}, n), Stage(shape(16), {}, 10)]
    assert peak(Tokenizer(TOKENIZER, {}), stages, parts, program).cache == max(drafter, refiner)
    assert (drafter > refiner) == (decides == "drafter")
