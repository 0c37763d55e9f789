"""Early exit: drafts are those of a forward through the first layers, and of all layers the text itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding.drafter import TargetView
from decoding.drafters.early_exit import EarlyExit
from decoding.generate import generate
from decoding.place import Place
from decoding.policies import Static
from decoding.sampling import Sampling, batch_sampling
from decoding.trees import chain
from models import transformer
from models.errors import UserError
from models.layout import Layout
from models.linear import whole as whole_kernel
from tests.decoding.drafter_cases import LOPSIDED, random_target

PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8], [9]]

pytestmark = pytest.mark.usefixtures("x64")


@pytest.mark.parametrize(("layers", "lens"), [(1, False), (2, True)], ids=["as it is", "through a lens"])
def test_candidates_are_the_best_of_the_first_layers(layers: int, lens: bool) -> None:
    target = random_target(vocab_size=12, num_layers=3, windows=(4, None, 4))
    drafter = EarlyExit(layers, Static(LOPSIDED, "top"), lens)
    A, b = np.random.default_rng(1).normal(size=(33, 32))[:32], np.random.default_rng(2).normal(size=32)
    params = {"lens": {"linear": {"kernel": jnp.asarray(A), "bias": jnp.asarray(b)}}} if lens else None
    text = jnp.array(np.random.default_rng(0).integers(0, 12, (2, 20)), jnp.int32)
    length = jnp.array([9, 1], jnp.int32)
    forward = jax.jit(transformer.forward, static_argnames=("config", "layers", "taps"))
    cache = forward(target.config, target.params, text, Layout.causal(2, 20)).rows
    view = TargetView(
        target.config, target.params, cache, Place.of_text(length), text, batch_sampling([Sampling()] * 2)
    )
    root = jnp.take_along_axis(text, length[:, None], axis=1)[:, 0]
    keys = jax.vmap(jax.random.key)(jnp.arange(2))
    tree, _ = jax.jit(lambda root: drafter.draft(params, view, (), root, keys))(root)
    # All root paths in one forward: what follows their ends no row of them sees.
    inner = np.flatnonzero(LOPSIDED.children[:, 0] >= 0)
    paths = [
        np.asarray(tree.tokens[row])[np.flatnonzero(LOPSIDED.ancestors[node])] for row in range(2) for node in inner
    ]
    texts = [
        [*text[i // len(inner), : length[i // len(inner)]].tolist(), *path.tolist()] for i, path in enumerate(paths)
    ]
    whole = jnp.array([[*seen, *[0] * (20 - len(seen))] for seen in texts], jnp.int32)
    layout = Layout.causal(*whole.shape)
    out = forward(target.config, target.params, whole, layout, layers=(0, layers), taps=("pre_norm",))
    x = np.asarray(out.taps["pre_norm"])
    x = x + x @ A + b if lens else x
    scale = np.asarray(target.params["final_norm"]["scale"])
    x = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + target.config.norm_eps) * scale
    logits = x @ np.asarray(whole_kernel(target.params["head"]["kernel"]))
    for i, seen in enumerate(texts):
        wanted = LOPSIDED.children[inner[i % len(inner)]]
        wanted = wanted[wanted >= 0]
        best = np.argsort(-logits[i, len(seen) - 1])[: len(wanted)]
        assert np.asarray(tree.tokens[i // len(inner)])[wanted].tolist() == best.tolist()


@pytest.mark.parametrize("draws", ["top", "without"], ids=["greedy", "sampled"])
def test_of_all_layers_every_draft_is_accepted(draws) -> None:
    """Greedily, and where draft and target distribution are the same; top-p cuts only the target's."""
    target = random_target(vocab_size=12)
    drafter = EarlyExit(2, Static(chain(3), draws))
    arguments = dict(max_new_tokens=41, stop=[])
    warm = [Sampling(temperature=1.0), Sampling(temperature=2.0), Sampling(temperature=1.0, top_p=0.9)]
    sampling = [Sampling()] * 3 if draws == "top" else warm
    generation = generate(target, PROMPTS, drafter=drafter, sampling=sampling, **arguments)
    accepted = [stats.accepted_by_depth.tolist() for stats in generation.stats]
    if draws == "top":
        assert generation.tokens == generate(target, PROMPTS, **arguments).tokens and accepted[2] == [10, 10, 10]
    assert accepted[:2] == [[10, 10, 10]] * 2 and generation.stats[2].acceptance_length > 1.5


def test_layers_that_are_not_there_are_refused() -> None:
    target = random_target(vocab_size=12)
    for layers in (0, 3):
        with pytest.raises(UserError, match=f"early_exit needs 1 to 2 layers of this target, got {layers}"):
            EarlyExit(layers).check(target.config)
