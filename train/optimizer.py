"""AdamW or Muon under a global-norm clip and a warmed-up schedule, from the schema's section."""

import re
from collections.abc import Mapping

import jax
import optax
import optax.contrib

from train.config import OptimizerConfig


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate by step: linear from 0 to the peak, then cosine, linear or constant down to `final_fraction`.

    Args:
      config: the optimizer section.
      steps: length of the run; the last rate is reached there.
    """
    peak, end, fall = config.learning_rate, config.learning_rate * config.final_fraction, steps - config.warmup_steps
    after = {
        "cosine": optax.cosine_decay_schedule(peak, fall, alpha=config.final_fraction),
        "linear": optax.linear_schedule(peak, end, fall),
        "constant": optax.constant_schedule(peak),
    }[config.schedule]
    if config.warmup_steps == 0:
        return after
    # Step 0 already moves: a warm-up that began at rate 0 would spend its first batch on nothing.
    warmup = optax.linear_schedule(peak / config.warmup_steps, peak, max(config.warmup_steps - 1, 1))
    return optax.join_schedules([warmup, after], [config.warmup_steps])


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The update rule over trainable parameters; its state holds nothing else."""
    schedule = make_schedule(config, steps)
    betas = {"b1": config.b1, "b2": config.b2}
    if config.name == "muon":
        rule = optax.contrib.muon(
            schedule,
            beta=config.b1,
            eps=config.eps,
            weight_decay=config.weight_decay,
            weight_decay_mask=decays,
            adam_learning_rate=schedule,
            muon_weight_dimension_numbers=kernel_axes,
            # The root mean square of an AdamW update, which keeps one learning rate right for both.
            consistent_rms=0.2,
            **{f"adam_{name}": beta for name, beta in betas.items()},
        )
    else:
        rule = optax.adamw(schedule, eps=config.eps, weight_decay=config.weight_decay, mask=decays, **betas)
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), rule)


def apart(rules: Mapping[str, optax.GradientTransformation]) -> optax.GradientTransformation:
    """Every top-level part of the parameters updated by a rule of its own, as if the others were not there."""

    def of(params, name):
        # Named, because a rule may ask what a parameter is called.
        return {name: params[name]}

    def init(params):
        return {name: rule.init(of(params, name)) for name, rule in rules.items()}

    def update(gradient, state, params=None):
        done = {name: rule.update(of(gradient, name), state[name], of(params, name)) for name, rule in rules.items()}
        moved = {name: found[name] for name, (found, _) in done.items()}
        return moved, {name: kept for name, (_, kept) in done.items()}

    return optax.GradientTransformation(init, update)


def kernel_axes(params):
    """Muon's view of the parameters: the [in, out] axes of kernels, stacked or not, and None for what AdamW updates.

    Vocabulary maps are among the latter, as embeddings are: a row per token is no map between spaces, and to
    orthogonalise one costs more than all other products of a step.
    """
    axes = optax.contrib.MuonDimensionNumbers(reduction_axis=(-2,), output_axis=(-1,))

    def view(path, _):
        named = re.search(r"(\w+)/kernel$", _name(path))
        return axes if named and named[1] not in ("head", "vocab") else None

    return jax.tree_util.tree_map_with_path(view, params)


# What has one number per channel or position, by name: stacked layers give these a second axis, so rank cannot tell.
_NOT_DECAYED = re.compile(
    r"(^|/)(scale|bias|q_bias|v_bias|log_scale|offset)$"  # norms and maps; a VAR's attention and shared adaLN
    r"|(^|/)mask_(hidden|embedding)$"  # what a draft network reads where it knows nothing
    r"|_conv/base$"  # DFlash2's taps, which begin as the identity
    r"|(^|/)soft/(embedding|gate)$"  # what a coprocessor reads, and how much of its last latent counts
    r"|(^|/)(positions|levels)/"  # a VAR's tables of places; its table of classes does decay
)


def decays(params):
    """True for the parameters that weight decay shrinks, which are the matrices."""

    def decayed(path, _):
        return not _NOT_DECAYED.search(_name(path))

    return jax.tree_util.tree_map_with_path(decayed, params)


def _name(path) -> str:
    return "/".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path)
