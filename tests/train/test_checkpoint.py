"""Training state on disk: exact, safe from donation, a few steps deep, refused where it does not fit."""

import errno
import json
import pathlib
import random
import shutil
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st

from models.errors import UserError
from tests.fuzz import FEW_OR_MANY, fuzz
from train.checkpoint import Checkpoints, not_finite, restore, restore_newest


def state_of(value: float):
    params = {"layers": [{"kernel": jnp.full((300, 400), value)}, {"kernel": jnp.full((3,), value, jnp.bfloat16)}]}
    return {
        "params": params,
        "optimizer": optax.adamw(1e-3).init(params),
        "step": jnp.int32(value),
        "key": jax.random.key_data(jax.random.key(7)),
    }


def abstract(state):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)


def test_a_saved_state_survives_the_donation_of_its_buffers(tmp_path):
    advance = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + jnp.ones_like(leaf), state), donate_argnums=0)
    state, truth = state_of(0.0), {}
    with Checkpoints(tmp_path / "checkpoints", keep=3) as checkpoints:
        assert checkpoints.latest is None
        for step in range(1, 5):
            state = advance(state)
            truth[step] = jax.tree.map(np.array, state)
            checkpoints.save(step, state, {"next_index": 10 * step})
            for _ in range(20):
                state = advance(state)
    with Checkpoints(tmp_path / "checkpoints", keep=3) as checkpoints:
        assert checkpoints.latest == 4
        assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2", "3", "4"]
        for step in (2, 4):
            restored, position = restore(tmp_path / "checkpoints" / str(step), abstract(state))
            assert position == {"next_index": 10 * step}
            assert jax.tree.structure(restored) == jax.tree.structure(state)
            jax.tree.map(np.testing.assert_array_equal, restored, truth[step])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: {**s, "step": jax.ShapeDtypeStruct((2,), jnp.int32)}, "step is int32[] there and int32[2] here"),
        (lambda s: {**s, "step": jax.ShapeDtypeStruct((), jnp.uint32)}, "step is int32[] there and uint32[] here"),
        (lambda s: {**s, "more": jax.ShapeDtypeStruct((1,), jnp.int32)}, "more is absent there and int32[1] here"),
        (lambda s: {key: s[key] for key in s if key != "key"}, "key is uint32[2] there and absent here"),
    ],
)
def test_a_state_that_does_not_fit_is_one_sentence(change, words, tmp_path):
    state = state_of(1.0)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state, {})
    with pytest.raises(UserError) as caught:
        restore(tmp_path / "1", change(abstract(state)))
    assert words in str(caught.value)


def test_what_a_kill_left_half_written_is_ignored_and_removed(tmp_path):
    state = state_of(1.0)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(1, state, {"next_index": 1})
    torn = tmp_path / "2.orbax-checkpoint-tmp"
    torn.mkdir()
    (torn / "manifest.ocdbt").write_text("torn")
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.latest == 1
        checkpoints.save(2, state, {"next_index": 2})
        checkpoints.wait()
        assert checkpoints.latest == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


def test_a_full_disk_is_an_oserror_and_leaves_nothing_torn(tmp_path, monkeypatch):
    state = state_of(1.0)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(1, state, {})
        checkpoints.wait()
        torn = tmp_path / "2.orbax-checkpoint-tmp"
        torn.mkdir()

        def fail():
            raise ValueError("RESOURCE_EXHAUSTED: writing failed: No space left on device [os_error_code=28]")

        monkeypatch.setattr(checkpoints._checkpointer, "wait", fail)
        with pytest.raises(OSError) as caught:
            checkpoints.wait()
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


# Damage.


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> pathlib.Path:
    """Checkpoints 20 and 40, whose numbers do not compress, so that bytes in their files are bytes of numbers."""
    directory = tmp_path_factory.mktemp("whole")
    with Checkpoints(directory, keep=2) as checkpoints:
        for step in (20, 40):
            checkpoints.save(step, drawn(step), {"next_index": step})
    return directory


def drawn(step: int) -> dict[str, jax.Array]:
    numbers = np.random.default_rng(step).standard_normal((30, 40), np.float32)
    return {"numbers": jnp.asarray(numbers), "half": jnp.asarray(numbers[0], jnp.bfloat16), "step": jnp.int32(step)}


def newest_of(directory: pathlib.Path) -> tuple[int, list[str]]:
    """The step restored, which holds what was saved in it and can be gone on from, and what was said."""
    said: list[str] = []
    found = restore_newest(directory, abstract(drawn(0)), said.append)
    assert found is not None
    step, state, position = found
    jax.tree.map(np.testing.assert_array_equal, state, drawn(step))
    assert position == {"next_index": step}
    if said:
        with Checkpoints(directory, keep=2) as checkpoints:
            assert checkpoints.latest == step
    return step, said


def largest(directory: pathlib.Path) -> pathlib.Path:
    return max((path for path in directory.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def told(directory: pathlib.Path, key: str, value) -> None:
    path = directory / "_CHECKPOINT_METADATA"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))


def zeroed(path: pathlib.Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:500] + bytes(64) + content[564:])


DAMAGE: dict[str, Callable[[pathlib.Path], object]] = {
    "the largest file cut short": lambda d: largest(d).write_bytes(largest(d).read_bytes()[:1000]),
    "zeros in the largest file": lambda d: zeroed(largest(d)),
    "no _METADATA": lambda d: (d / "state" / "_METADATA").unlink(),
    "no _CHECKPOINT_METADATA": lambda d: (d / "_CHECKPOINT_METADATA").unlink(),
    "nothing left": lambda d: (shutil.rmtree(d), d.mkdir()),
    "a file in its place": lambda d: (shutil.rmtree(d), d.write_text("x")),
    "a time that is none": lambda d: told(d, "init_timestamp_nsecs", "x"),
    "no position": lambda d: told(d, "custom_metadata", {}),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 6e4, 0.0])
def test_numbers_that_are_not_finite_are_found_by_name(value, dtype):
    with np.errstate(all="ignore"):
        spoilt = np.array([1.0, value]).astype(dtype)
    state = {"params": [{"a": jnp.ones(2)}, {"b": jnp.asarray(spoilt)}], "step": jnp.uint32(2**32 - 1)}
    assert not_finite(state) == (None if np.isfinite(value) else "params/1/b")


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_checkpoint_before_a_damaged_one_is_taken(damage, whole, tmp_path, capfd):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    DAMAGE[damage](run / "40")
    step, (line,) = newest_of(run)
    assert step == 20 and line.startswith(f"checkpoint 40 in {run} is damaged (")
    assert line.endswith("; it is kept as damaged-40-1, and the run goes on from checkpoint 20")
    assert "Traceback" not in capfd.readouterr().err


def test_the_step_of_a_damaged_checkpoint_can_be_saved_again(whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    for n in (1, 2):
        zeroed(largest(run / "40"))
        assert newest_of(run)[0] == 20
        with Checkpoints(run, keep=2) as checkpoints:
            checkpoints.save(40, drawn(40), {"next_index": 40})
        assert sorted(path.name for path in run.glob("damaged*")) == ["damaged-40-1", "damaged-40-2"][:n]
    assert newest_of(run) == (40, [])


def test_older_damage_is_put_aside_too(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    told(tmp_path / "run" / "20", "init_timestamp_nsecs", "x")
    step, (line,) = newest_of(tmp_path / "run")
    assert step == 40 and "checkpoint 20 in" in line


def test_none_that_is_whole_is_one_sentence_and_nothing_is_moved(whole, tmp_path):
    run = tmp_path / "run"
    assert restore_newest(run, abstract(drawn(0)), print) is None
    shutil.copytree(whole, run)
    for step in ("20", "40"):
        DAMAGE["no position"](run / step)
    with pytest.raises(UserError, match=rf"^no checkpoint in {run} can be read \(40: it does not .*; 20: it does not"):
        restore_newest(run, abstract(drawn(0)), print)
    assert sorted(path.name for path in run.iterdir()) == ["20", "40"]


def survives(whole: pathlib.Path, folder: pathlib.Path, seed: int) -> None:
    """Whatever is done to one file of the newest checkpoint, what is restored is what was saved."""
    draw = random.Random(seed)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
    path = draw.choice(sorted(path for path in (folder / "40").rglob("*") if path.is_file()))
    content = bytearray(path.read_bytes())
    first, length = draw.randrange(len(content) + 1), draw.randint(1, 100)
    kind = draw.choice(("cut", "gone", "zeros", "garbage", "bit"))
    if kind == "cut":
        content = content[:first]
    elif kind == "zeros":
        content[first : first + length] = bytes(len(content[first : first + length]))
    elif kind == "garbage":
        content[first : first + length] = draw.randbytes(len(content[first : first + length]))
    elif kind == "bit" and first < len(content):
        content[first] ^= 1 << draw.randrange(8)
    path.write_bytes(content)
    if kind == "gone":
        path.unlink()
    newest_of(folder)


@pytest.mark.parametrize("examples", FEW_OR_MANY)
def test_damaged_files_are_never_taken_for_whole(examples, whole, tmp_path):
    fuzz(6 * examples, st.integers(0, 2**32), lambda seed: survives(whole, tmp_path / "run", seed))
