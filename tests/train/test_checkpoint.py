"""Training state on disk: exact, safe from donation, a few steps deep, refused where it does not fit."""

import errno

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from models.errors import UserError
from train.checkpoint import Checkpoints


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
            restored, position = checkpoints.restore(step, abstract(state))
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
        checkpoints.wait()
        with pytest.raises(UserError) as caught:
            checkpoints.restore(1, change(abstract(state)))
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
