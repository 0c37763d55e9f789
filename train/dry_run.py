"""What a job would be, from shapes alone: resolved config, parameters, shardings, memory."""

import json
import math
import re
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from models.schema import resolved
from train.config import TrainConfig
from train.data.corpus import open_corpus
from train.kept_features import kept_features
from train.trainer import Plan, count, describe_job, lowered_step, make_plan

# A CPU multiplies no bfloat16: it makes float32 copies of what a product reads, and would make those of all scanned
# layers at once, in front of the loop, and run independent parts side by side. An accelerator does neither.
_AS_ON_ACCELERATORS = {
    "xla_disable_hlo_passes": "while-loop-invariant-code-motion",
    "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
}


def describe(config: TrainConfig, memory: bool = False) -> str:
    """The text that `--dry_run` prints; with `memory`, that of the compiled step too.

    Raises UserError where training would have refused to start.
    """
    corpus = open_corpus(config)
    plan = make_plan(config, corpus.facts)
    sections = [
        json.dumps(resolved(config), indent=2),
        describe_job(plan),
        _table("trainable", plan.state["params"]),
    ]
    if plan.frozen is not None:
        sections.append(_table("frozen", plan.frozen))
    sections.append(_memory(plan))
    if (kept := kept_features(config, plan.objective, corpus)) is not None:
        sections.append(str(kept))
    if memory:
        example = next(iter(corpus.batches(config.batch_size, config.seed)))
        row = {name: (array.shape[1:], array.dtype) for name, array in example.items()}
        sections.append(of_step(plan, row | plan.objective.refreshed(config.length)))
    return "\n\n".join(sections)


def of_step(plan: Plan, row: dict[str, tuple[tuple[int, ...], Any]], largest: int = 10) -> str:
    """What the compiled step takes of each device, and its largest arrays; nothing is allocated.

    Args:
      plan: the job.
      row: shape and dtype of everything that a batch holds per row.
      largest: how many arrays to name.
    """
    found = compiled_sizes(plan, row)
    note = "; a CPU stands in for an accelerator, and keeps float32 copies of some bfloat16 arrays"
    lines = [f"  {name:<11}  {size / 2**30:8.2f} GiB  {size / 1e9:8.2f} GB" for name, size in found.bytes.items()]
    arrays = [f"  {size / 2**30:8.2f} GiB  {name}  x{times}" for size, name, times in found.arrays[:largest]]
    return "\n".join(
        [
            f"the step, per device (compiled in {found.seconds:.0f} s{note if found.stands_in else ''})",
            *lines,
            "its largest arrays",
            *arrays,
        ]
    )


class Sizes(NamedTuple):
    """What a compiled step takes of each device.

    Attributes:
      bytes: of its arguments, of temporaries, and of both, the `peak`.
      arrays: (bytes, shape, how often) of what it writes, largest first.
      seconds: of compilation.
      stands_in: whether a CPU compiled what is meant for an accelerator.
    """

    bytes: dict[str, int]
    arrays: list[tuple[int, str, int]]
    seconds: float
    stands_in: bool


def compiled_sizes(plan: Plan, row: dict[str, tuple[tuple[int, ...], Any]]) -> Sizes:
    """The sizes of a job's step, whose batch holds `row` per row; nothing is allocated."""
    batch = {
        name: jax.ShapeDtypeStruct((plan.config.batch_size, *shape), dtype, sharding=plan.batch_sharding)
        for name, (shape, dtype) in row.items()
    }
    begin = time.perf_counter()
    lowered = lowered_step(plan, plan.state, plan.frozen, batch)
    stands_in = jax.default_backend() == "cpu" and plan.objective.compute.dtype == jnp.bfloat16
    compiled = lowered.compile(compiler_options=_AS_ON_ACCELERATORS if stands_in else None)
    seconds, found = time.perf_counter() - begin, compiled.memory_analysis()
    sizes = {"arguments": found.argument_size_in_bytes, "temporaries": found.temp_size_in_bytes}
    return Sizes({**sizes, "peak": sum(sizes.values())}, arrays_of(compiled.as_text()), seconds, stands_in)


def arrays_of(program: str) -> list[tuple[int, str, int]]:
    """(bytes, shape, how often) of what a compiled program writes, largest first, without what fusions hold inside."""
    counts: dict[str, int] = {}
    fused = False
    for line in program.splitlines():
        if line and not line[0].isspace():
            fused = "fused" in line.split("(")[0]
        made = re.match(r"\s+(?:ROOT )?%\S+ = (\w+\[[\d,]*\])\S* ([\w-]+)\(", line)
        if made and not fused and made[2] not in ("parameter", "get-tuple-element", "bitcast", "constant"):
            counts[made[1]] = counts.get(made[1], 0) + 1
    return sorted(((_size(shape), shape, times) for shape, times in counts.items()), reverse=True)


def _size(shape: str) -> int:
    kind, dims = shape.rstrip("]").split("[")
    bits = 8 if kind == "pred" else int(re.sub(r"\D", " ", kind.split("e")[0]).split()[0])
    return math.prod(int(dim) for dim in dims.split(",") if dim) * bits // 8


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
