"""Schedules at the steps that matter, and what weight decay touches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import transformer
from models.config import TransformerConfig
from models.formats.storage import leaves_by_path
from models.heads.dflash import DFlashHeads
from models.images import var
from models.images.config import VARConfig
from train.config import OptimizerConfig
from train.optimizer import apart, decays, make_optimizer, make_schedule


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"schedule": "cosine", "final_fraction": 0.1}, {0: 0.25, 3: 1.0, 4: 1.0, 54: 0.55, 104: 0.1}),
        ({"schedule": "linear", "final_fraction": 0.0}, {0: 0.25, 3: 1.0, 4: 1.0, 54: 0.5, 104: 0.0}),
        ({"schedule": "constant", "final_fraction": 1.0}, {0: 0.25, 1: 0.5, 4: 1.0, 104: 1.0}),
        ({"schedule": "linear", "final_fraction": 0.5, "warmup_steps": 0}, {0: 1.0, 52: 0.75, 104: 0.5}),
        ({"schedule": "cosine", "warmup_steps": 1}, {0: 1.0, 1: 1.0}),
    ],
)
def test_the_schedule_warms_up_and_falls(changes, expected):
    config = OptimizerConfig(**{"learning_rate": 1.0, "warmup_steps": 4, **changes})
    schedule = make_schedule(config, steps=104)
    assert {step: pytest.approx(float(schedule(step)), abs=1e-6) for step in expected} == expected


def test_decay_spares_scales_and_biases_of_stacked_layers():
    shape = TransformerConfig(
        vocab_size=8, width=4, num_layers=2, num_heads=1, num_kv_heads=1, head_dim=4, mlp_width=4, qkv_bias=True
    )
    mask = decays(jax.eval_shape(transformer.stack_layers, transformer.param_shapes(shape)))
    assert mask["layers"]["attention"]["q"] == {"bias": False, "kernel": True}
    assert mask["layers"]["attention_norm"] == mask["final_norm"] == {"scale": False}
    assert mask["embed"] == {"embedding": True}


@pytest.mark.parametrize("shared", [False, True])
def test_decay_spares_what_a_var_has_one_number_of_per_channel_or_place(shared):
    shape = VARConfig(depth=2, width=4, num_heads=2, num_classes=3, scales=(1, 2), shared_modulation=shared)
    shapes = jax.eval_shape(lambda: transformer.stack_layers(var.init(shape, jax.random.key(0))))
    mask = leaves_by_path(decays(shapes))
    modulation = ["modulation/kernel"] if shared else ["layers/modulation/kernel"]
    kernels = ["attention/qkv", "attention/out", "mlp/up", "mlp/down"]
    assert {path for path, decayed in mask.items() if decayed} == {
        *("classes/embedding", "word/kernel", "head/modulation/kernel", "head/vocab/kernel"),
        *(f"layers/{name}/kernel" for name in kernels),
        *modulation,
    }
    assert {"positions/start", "positions/embedding", "levels/embedding", "layers/attention/log_scale"} < mask.keys()


@pytest.mark.parametrize("own", [False, True])
def test_decay_spares_soft_tokens_and_their_gate_under_a_rule_of_their_own_too(own):
    params = {"soft": {"embedding": jnp.ones((2, 4)), "gate": jnp.ones(4)}, "network": {"kernel": jnp.ones((4, 4))}}
    rule = make_optimizer(OptimizerConfig(learning_rate=0.1, weight_decay=0.5), 10)
    rule = apart({"soft": rule, "network": rule}) if own else rule
    updates, _ = rule.update(jax.tree.map(jnp.zeros_like, params), rule.init(params), params)
    assert updates["network"]["kernel"].all() and not any(leaf.any() for leaf in updates["soft"].values())


def test_decay_spares_the_taps_of_dflash2():
    heads = DFlashHeads((1, 2, 3), 5, num_layers=2, block=4, convolution=True)
    sizes = dict(width=16, num_layers=4, num_heads=2, num_kv_heads=1, head_dim=8, mlp_width=8, max_position=8)
    target = TransformerConfig(vocab_size=16, tied_embeddings=True, **sizes)
    shapes = jax.eval_shape(functools.partial(heads.init, target), transformer.param_shapes(target), jax.random.key(0))
    mask = leaves_by_path(decays(shapes))
    taps = {path for path in mask if path.endswith("_conv/base")}
    assert taps and not any(mask[path] for path in taps)


def test_gradients_are_clipped_before_adam_sees_them():
    params = {"w": {"kernel": jnp.zeros((2, 2))}}
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1.0, clip_norm=0.5, b1=0.0), steps=2)
    _, state = optimizer.update({"w": {"kernel": jnp.full((2, 2), 100.0)}}, optimizer.init(params), params)
    (moment,) = (leaf for path, leaf in jax.tree.flatten_with_path(state)[0] if "mu" in str(path))
    np.testing.assert_allclose(jnp.linalg.norm(moment), 0.5, rtol=1e-6)


def test_muon_orthogonalises_each_stacked_kernel_and_leaves_vocabularies_and_the_rest_to_adam():
    params = {
        "layer": {"kernel": jnp.zeros((2, 6, 4)), "bias": jnp.zeros((2, 4))},
        "embed": {"embedding": jnp.zeros((5, 4))},
        "heads": [{"vocab": {"kernel": jnp.zeros((4, 5))}}],
    }
    rng = np.random.default_rng(0)
    gradient = jax.tree.map(lambda leaf: jax.device_put(np.float32(rng.normal(size=leaf.shape))), params)
    config = OptimizerConfig(learning_rate=1.0, name="muon", schedule="constant", final_fraction=1.0, clip_norm=1e9)
    optimizer = make_optimizer(config, steps=2)
    update = jax.jit(lambda gradient: optimizer.update(gradient, optimizer.init(params), params)[0])(gradient)
    for layer in np.asarray(update["layer"]["kernel"]):
        values = np.linalg.svd(layer, compute_uv=False)
        # Newton-Schulz brings all singular values near one size, which is the scale that makes the RMS about 0.2.
        assert values.max() / values.min() < 2.2
        assert np.sqrt(np.mean(layer**2)) == pytest.approx(0.2, rel=0.4)
    pairs = (
        (update["layer"]["bias"], gradient["layer"]["bias"]),
        (update["embed"]["embedding"], gradient["embed"]["embedding"]),
        (update["heads"][0]["vocab"]["kernel"], gradient["heads"][0]["vocab"]["kernel"]),
    )
    for leaf, slope in pairs:
        # Adam's first step: the same size everywhere, against the gradient.
        np.testing.assert_array_equal(np.sign(leaf), -np.sign(slope))
        np.testing.assert_allclose(np.abs(leaf), np.abs(leaf).max(), rtol=1e-3)
