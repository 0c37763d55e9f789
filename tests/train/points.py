"""Augmentation points one at a time, each a text of its own decoded from a cache: packed ones are compared with it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from decoding.cache import commit, init_cache
from models import coprocessor, transformer
from models.attention import Sources
from models.layout import BlockCausal, Causal, Layout

LENGTH = 20
# Rows of (documents' lengths); what is left of a row is padding.
ROWS = [(9, 11), (2, 5, 7)]
# Scores that exist at once, so that two of five points do.
TURNS = 2 * 2 * 2 * 6 * LENGTH
AT = [[1, 3, 5, 12, 19], [0, 3, 6, 8, 13]]

FLAGS = {
    "full": {"kind": "full"},
    "pause": {"kind": "pause"},
    "soft": {"kind": "soft", "positions": "hold"},
    "last_layer": {"kind": "full", "reads": "last_layer", "suffix_attn": "bidirectional"},
    "lora": {
        "kind": "lora",
        "rank": 2,
        "lora_scale": 2.0,
        "positions": "hold",
        "latent_attn": "bidirectional",
        "z_scale": "match_rms",
        "z_tap": "pre_norm",
        "z_base": "last_token",
        "max_lag": 2,
    },
}


def one_at_a_time(objective, params, frozen, batch, places):
    """Latents, and what the head reads behind them: every point a text of its own, cut off there, its latents and then
    its tokens put into its cache one after the other."""
    model, config = objective.model, objective._config.coprocessor
    number, count = config.num_latents, places.at.size
    segments = np.asarray(batch["segments"])
    texts, lengths = np.zeros((count, LENGTH), np.int32), np.zeros(count, np.int32)
    for r, (b, q) in enumerate((b, q) for b, row in enumerate(np.asarray(places.at)) for q in row):
        first = int(np.argmax(segments[b] == segments[b, q]))
        lengths[r] = q + 1 - first
        texts[r, : lengths[r]] = np.asarray(batch["tokens"])[b, first : q + 1]
    lag = places.lag.reshape(-1)
    beyond = jnp.arange(number) + 1 if config.positions == "advance" else jnp.zeros(number, jnp.int32)
    shift = number if config.positions == "advance" else 0

    def order(kind):
        return BlockCausal(number) if kind == "bidirectional" else Causal()

    @jax.jit
    def run(params, frozen, texts, lengths, known):
        target, own = transformer.unstack_layers(frozen), dict(params["network"])
        for name in ("layers", "adapters"):
            if name in own:
                own[name] = transformer.unstack_layers({"layers": own[name]})["layers"]
        read = coprocessor.network(config, {"network": own}, target)
        forward = functools.partial(transformer.forward, model)
        prompt = forward(target, texts, Layout.causal(*texts.shape))
        empty = init_cache(model, count, 2 * LENGTH, jnp.float64)
        cache = memory = commit(empty, prompt.rows, None, jnp.zeros_like(lengths))
        if config.reads == "last_layer":
            rows = forward(read, prompt.hidden, Layout.causal(*texts.shape)).rows
            memory = commit(empty, rows, None, jnp.zeros_like(lengths))
        soft = jnp.broadcast_to(params["soft"]["embedding"], (count, number, model.width))
        snapshot = (lengths - lag)[:, None]
        layout = Layout(snapshot - 1 + beyond, snapshot, order(config.latent_attn))
        z = forward(read, soft, layout, Sources(memory), taps=(config.z_tap,)).taps[config.z_tap]
        if config.z_scale == "match_rms":
            z = z / jnp.sqrt(jnp.mean(z**2, axis=-1, keepdims=True)) * params["network"]["latent"]["scale"]
        if config.z_base == "last_token":
            behind = jnp.take_along_axis(texts, lengths[:, None] - 1, axis=1)
            z = z.at[:, -1:].set(transformer.embed(model, target, behind) + params["soft"]["gate"] * z[:, -1:])
        layout = Layout(lengths[:, None] - 1 + beyond, lengths[:, None], order(config.suffix_attn))
        out = forward(target, z, layout, Sources(cache))
        cache, found = commit(cache, out.rows, None, lengths), [out.hidden[:, -1]]
        for i in range(known.shape[1]):
            slots = lengths + number + i
            layout = Layout.extend(slots, 1, first=lengths + shift + i)
            out = forward(target, known[:, i : i + 1], layout, Sources(cache))
            cache = commit(cache, out.rows, None, slots)
            found.append(out.hidden[:, 0])
        return z, jnp.stack(found, axis=1)

    known = places.labels[..., :-1].reshape(count, -1)
    found = run(params, frozen, jnp.asarray(texts), jnp.asarray(lengths), known)
    return [x.reshape(*places.at.shape, *x.shape[1:]) for x in found]


def compare(packed, alone, places):
    """Of the places that are."""
    kept, counted = np.asarray(places.kept), np.asarray(places.counted)
    for ours, theirs, told in ((packed.latents, alone[0], kept), (packed.hidden, alone[1], counted)):
        np.testing.assert_allclose(np.asarray(ours)[told], np.asarray(theirs)[told], rtol=0, atol=1e-12)
    assert counted.sum() > 15 and not counted[:, -1].all()
