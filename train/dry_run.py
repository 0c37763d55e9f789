"""What a job would be, from shapes alone: resolved config, parameters, shardings, memory."""

import json
import math
from typing import Any

import jax

from models.schema import resolved
from train.config import TrainConfig
from train.data.corpus import open_corpus
from train.kept_features import kept_features
from train.trainer import Plan, count, describe_job, make_plan


def describe(config: TrainConfig) -> str:
    """The text that `--dry_run` prints. Raises UserError where training would have refused to start."""
    corpus = open_corpus(config)
    plan = make_plan(config, corpus.facts)
    sections = [
        json.dumps(resolved(config), indent=2),
        describe_job(plan),
        _table("trainable", plan.state["params"]),
    ]
    if plan.frozen is not None:
        sections.append(_table("frozen", plan.frozen))
    kept = kept_features(config, plan.objective, corpus)
    return "\n\n".join([*sections, _memory(plan), *([] if kept is None else [str(kept)])])


def _table(title: str, params: Any) -> str:
    rows = []
    for path, leaf in jax.tree.flatten_with_path(params)[0]:
        name = "/".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path)
        shape = f"{leaf.dtype}[{', '.join(map(str, leaf.shape))}]"
        rows.append((name, shape, f"{leaf.sharding.spec}".removeprefix("PartitionSpec")))
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    lines = [f"  {name:<{widths[0]}}  {shape:<{widths[1]}}  {spec}" for name, shape, spec in rows]
    return "\n".join([f"{title}: {count(params):,} parameters", *lines])


def _memory(plan: Plan) -> str:
    """Bytes that each device holds between steps, and the gradient's; activations show when the step is compiled."""
    parts = {
        "trainable parameters": plan.state["params"],
        "average of the parameters": plan.state.get("average"),
        "optimizer state": plan.state["optimizer"],
        "gradient": plan.state["params"],
        "frozen parameters": plan.frozen,
    }
    sizes = {name: _bytes_per_device(tree) for name, tree in parts.items() if tree is not None}
    sizes["total, without activations"] = sum(sizes.values())
    width = max(map(len, sizes))
    return "\n".join(
        ["memory per device", *(f"  {name:<{width}}  {size / 2**20:12,.1f} MiB" for name, size in sizes.items())]
    )


def _bytes_per_device(tree: Any) -> int:
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
