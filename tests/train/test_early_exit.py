"""A lens before a target's final norm: its loss, and that it is saved, loaded and changes nothing at the start."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding.drafters.early_exit import EarlyExit
from decoding.drafters.registry import load_drafter
from models import transformer
from models.errors import UserError
from models.formats.target import load_target
from train.objectives.early_exit import EarlyExitConfig
from train.objectives.target_features import layout_of


def test_the_loss_is_that_of_the_first_layers_through_the_lens(draft_setting, target_directory, tmp_path):
    objective, params, frozen, batch = draft_setting("early_exit", labels="all")
    fresh = jax.tree.map(np.zeros_like, params)

    @jax.jit
    def program(params, fresh, frozen, batch):
        def loss(params, frozen):
            (sums, weights), _ = objective.loss(params, frozen, batch, jax.random.key(0), 0.0)
            return (sums / weights)[0]

        config, lists = objective.model, transformer.unstack_layers(frozen)
        layout = layout_of(batch)
        whole = transformer.forward(config, lists, batch["tokens"], layout).logits
        early = transformer.forward(config, lists, batch["tokens"], layout, layers=(0, 1), taps=("pre_norm",))
        x = early.taps["pre_norm"]
        x = x + x @ params["lens"]["linear"]["kernel"] + params["lens"]["linear"]["bias"]
        seen = transformer.head(config, frozen, transformer.final_norm(config, frozen, x))
        return loss(params, frozen), loss(fresh, frozen), whole, early.logits, seen, jax.grad(loss)(params, frozen)

    *found, whole, early, seen, slopes = program(params, fresh, frozen, batch)
    segments = np.asarray(batch["segments"])
    counted = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    # The first place of a row has no token before it, at which a drafter would stand.
    counted[:, 0] = False
    for loss, logits in zip(found, (seen, early), strict=True):
        compared = -jnp.sum(jax.nn.softmax(whole) * jax.nn.log_softmax(logits), axis=-1)
        assert float(loss) == pytest.approx(float(np.asarray(compared)[:, :-1][counted].mean()), rel=1e-5)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(slopes))

    target = load_target(target_directory)
    objective.export(tmp_path / "drafter", params, frozen)
    drafter, loaded = load_drafter(tmp_path / "drafter", target)
    assert drafter == EarlyExit(1, lens=True)
    assert jax.tree.all(jax.tree.map(np.array_equal, loaded, params))


def test_what_makes_no_sense_is_refused():
    with pytest.raises(UserError, match=r"objective\.target must be the directory"):
        EarlyExitConfig("early_exit", None, 1)
    with pytest.raises(UserError, match="both 0: there is nothing to learn"):
        EarlyExitConfig("early_exit", "there", 1, soft=0.0)
