"""The trainer, in the order one thinks: devices, mesh, data, state, sharding, step, checkpoint, evaluation, loop.

    loss = sum over terms of  sum(loss over the global batch) / sum(weight over the global batch)

Under `jit` the batch is one global array split over the mesh's data axes, so both sums, and the gradient, are those of
the whole batch however it is sharded. State that changes (trainable parameters, optimizer, step, key) is donated to
the step; frozen parameters are an argument beside it. Metrics are fetched one step late: the device already runs step n
while the numbers of n - 1 are looked at. Before a state is saved its own metrics and all that it holds are looked at,
so that no checkpoint is of a run that had already gone wrong.
"""

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from models import processes, sharding
from models.errors import UserError
from models.schema import resolved
from train import provenance
from train.checkpoint import Checkpoints, not_finite, restore_newest, saved_steps
from train.config import OptimizerConfig, TrainConfig
from train.data.corpus import Corpus, TextCorpus, open_corpus
from train.fingerprint import fingerprint
from train.kept_features import kept_features, with_features
from train.metrics import NotFinite, Report
from train.objectives import OBJECTIVES
from train.objectives.objective import Batch, Compute, Objective, Params, Replaced, Sums
from train.optimizer import apart, make_optimizer, make_schedule

State = dict[str, Any]
Metrics = dict[str, jax.Array]
_REFRESH, _REPLACE = 1, 2  # What draws beside the loss.


@dataclasses.dataclass(frozen=True)
class Plan:
    """A job with everything decided and nothing allocated.

    Attributes:
      config: the job.
      mesh: its devices.
      objective: its method.
      optimizer: its update rule.
      state: `ShapeDtypeStruct`s with shardings of what changes: `params`, `optimizer`, `step` (int32 []), `key`
        (raw key data, uint32) and, where the optimizer asks for it, `average` (of `params`).
      base: the same of what is loaded from disk, or None.
    """

    config: TrainConfig
    mesh: Mesh
    objective: Objective
    optimizer: optax.GradientTransformation
    state: State
    base: Params | None

    @property
    def frozen(self) -> Params | None:
        """The part of `base` that lives as long as the run."""
        return self.objective.frozen_part(self.base)

    @property
    def batch_sharding(self) -> NamedSharding:
        """Rows split over the data axes."""
        return NamedSharding(self.mesh, PartitionSpec(sharding.BATCH))


class Profiler:
    """Traces a range of steps into `workdir/profile`, for xprof or TensorBoard's profile tab."""

    def __init__(self, workdir: Path, steps: tuple[int, int] | None):
        """`steps`: first and last step to trace, both included; None traces nothing."""
        self._directory, self._steps = workdir / "profile", steps

    @contextlib.contextmanager
    def around(self, step: int) -> Iterator[None]:
        """Marks one step; the trace ends once the devices have finished the last."""
        if self._steps is None:
            yield
            return
        if step == self._steps[0]:
            jax.profiler.start_trace(self._directory)
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield
        if step == self._steps[1]:
            jax.effects_barrier()
            jax.profiler.stop_trace()


def make_plan(config: TrainConfig, facts: Any) -> Plan:
    """Mesh, objective, optimizer, and by `eval_shape` the state's shapes and shardings.

    Args:
      config: the job.
      facts: of its corpus.

    Raises:
      UserError: the mesh does not cover the devices or splits a row over processes, the batch does not divide over it,
        its rows are longer than the model's longest sequence, or the objective refuses.
    """
    mesh = sharding.with_whole_rows(sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor))
    parts = math.prod(mesh.shape[axis] for axis in sharding.BATCH)
    if config.batch_size % parts:
        raise UserError(f"batch_size ({config.batch_size}) must be a multiple of the mesh's data x fsdp size ({parts})")
    if config.batch_size % (parts * config.accumulate):
        raise UserError(
            f"batch_size ({config.batch_size}) must be a multiple of accumulate ({config.accumulate}) times the mesh's "
            f"data x fsdp size ({parts})"
        )
    objective = OBJECTIVES[config.objective.name](config.objective, facts)
    objective.prepare(Compute(config.precision, mesh.size, config.remat))
    objective.check(config.length)
    if config.length is not None and config.length > objective.model.max_position:
        longest = objective.model.max_position
        raise UserError(f"config.length ({config.length}) exceeds the longest sequence of the model ({longest})")
    check_refreshed(config, objective)
    sections = optimizers(config, objective)
    for name, section in sections.items():
        section.check_fits(config.steps, f"{name}: optimizer")
    rules = {name: make_optimizer(section, config.steps) for name, section in sections.items()}
    optimizer = rules[""] if "" in rules else apart(rules)
    state = jax.eval_shape(functools.partial(init_state, config, objective, optimizer), objective.base)
    return Plan(
        config, mesh, objective, optimizer, _place(mesh, state), _place(objective.base_mesh(mesh), objective.base)
    )


def check_refreshed(config: TrainConfig, objective: Objective) -> None:
    """Raises UserError where a job writes text as it goes on, and could not resume in the middle of it."""
    if not (every := objective.refresh_every):
        return
    if config.checkpoint.every % every:
        raise UserError(
            f"checkpoint.every ({config.checkpoint.every}) must be a multiple of the {every} steps that learn from one "
            "text, which no checkpoint holds"
        )
    if config.data.features is not None:
        raise UserError("data.features must be None: this job learns from text that it writes as it goes on")


def optimizers(config: TrainConfig, objective: Objective) -> dict[str, OptimizerConfig]:
    """The optimizer of each part of the trainables that has one of its own, or that of all under an empty name."""
    own = objective.optimizers.items()
    return {name: section or config.optimizer for name, section in own} or {"": config.optimizer}


def init_state(
    config: TrainConfig, objective: Objective, optimizer: optax.GradientTransformation, base: Params | None
) -> State:
    """The state at step 0; pure, so that it can be jitted, and evaluated for shapes alone."""
    init_key, run_key = jax.random.split(jax.random.key(config.seed))
    params = objective.init(init_key, base)
    state = {
        "params": params,
        "optimizer": optimizer.init(params),
        "step": jnp.int32(0),
        "key": jax.random.key_data(run_key),
    }
    # A copy, because donating one buffer twice is an error.
    return {**state, "average": jax.tree.map(jnp.copy, params)} if config.optimizer.ema else state


def learnt(state: State) -> Params:
    """The parameters to evaluate and to export: their average over the steps if there is one, else the newest."""
    return state.get("average", state["params"])


def make_step(plan: Plan) -> Callable[[State, Params | None, Batch], tuple[State, Metrics]]:
    """The update: (state, frozen, batch) -> (state, scalar metrics)."""
    rates = {
        f"{name}/learning_rate".removeprefix("/"): make_schedule(section, plan.config.steps)
        for name, section in optimizers(plan.config, plan.objective).items()
    }

    def step(state: State, frozen: Params | None, batch: Batch) -> tuple[State, Metrics]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state["key"]), state["step"])
        progress = state["step"] / plan.config.steps

        loss, measured, gradient = gradient_of(plan, state["params"], frozen, batch, key, progress)
        updates, optimizer = plan.optimizer.update(gradient, state["optimizer"], state["params"])
        metrics = {
            "loss": loss,
            **{name: total / jnp.maximum(weight, 1) for name, (total, weight) in measured.items()},
            "gradient_norm": optax.global_norm(gradient),
            **{name: schedule(state["step"]) for name, schedule in rates.items()},
        }
        done = state["step"] + 1
        updated = optax.apply_updates(state["params"], updates)
        share = done / plan.config.steps
        params, replaced = plan.objective.replace(updated, frozen, batch, done, share, beside(key, _REPLACE))
        state = {**state, "params": params, "optimizer": optimizer, "step": done}
        if "average" in state:
            decay = jnp.minimum(plan.config.optimizer.ema, (1 + done) / (10 + done))
            average = optax.incremental_update(updated, state["average"], 1 - decay)
            state["average"] = without_history(average, params, replaced)
        return state, metrics

    return step


def gradient_of(
    plan: Plan, params: Params, frozen: Params | None, batch: Batch, key: jax.Array, progress: jax.Array
) -> tuple[jax.Array, Sums, Params]:
    """The loss of a batch, what its objective measured, and the gradient.

    With `accumulate` parts, rows are taken in turns. The loss is a sum over a sum, so what all parts weigh is summed up
    first: for most objectives counts of labels, of which no network has to run.
    """

    def loss_of(params, batch, key, whole=None):
        (sums, weights), measured = plan.objective.loss(params, frozen, batch, key, progress)
        whole = weights if whole is None else whole
        return jnp.sum(sums / jnp.maximum(whole, 1)), (weights, measured)

    parts = plan.config.accumulate
    if parts == 1:
        (loss, (_, measured)), gradient = jax.value_and_grad(loss_of, has_aux=True)(params, batch, key)
        return loss, measured, gradient

    # Part k has the rows k, k + parts, ...: as many of every device as of every other.
    split = jax.tree.map(lambda rows: jnp.moveaxis(rows.reshape(-1, parts, *rows.shape[1:]), 1, 0), batch)
    each = (split, jax.random.split(key, parts))

    def total(function):
        shapes = jax.eval_shape(function, *jax.tree.map(lambda leaf: leaf[0], each))
        none = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return jax.lax.scan(lambda sum, part: (jax.tree.map(jnp.add, sum, function(*part)), None), none, each)[0]

    whole = total(lambda part, key: loss_of(params, part, key)[1][0])
    loss_and_gradient = jax.value_and_grad(loss_of, has_aux=True)
    (loss, (_, measured)), gradient = total(lambda part, key: loss_and_gradient(params, part, key, whole))
    return loss, measured, gradient


def without_history(average: Params, params: Params, replaced: Replaced) -> Params:
    """An average over steps in which what was put in the place of other values begins anew."""

    def anew(mask, average, params):
        return average if mask is None else jnp.where(mask, params, average)

    return jax.tree.map(anew, replaced, average, params, is_leaf=lambda mask: mask is None)


def train(config: TrainConfig, workdir: Path, profile: tuple[int, int] | None = None) -> None:
    """Runs a job to its end, from its newest checkpoint if it has one, and exports what it made.

    Args:
      config: the job.
      workdir: receives checkpoints, metrics, `run.json` and the product.
      profile: trace steps first to last, both included, into `workdir/profile`.

    Raises:
      UserError: bad input, or the loss or its gradient stopped being finite.
    """
    corpus = open_corpus(config)
    plan = make_plan(config, corpus.facts)
    if isinstance(corpus, TextCorpus):
        corpus = corpus.within(plan.objective.model.vocab_size, config.data)
    kept = kept_features(config, plan.objective, corpus)
    plan.objective.scan_data(corpus.train)
    evaluate = make_evaluation(plan, corpus)
    inputs = fingerprints(plan, corpus)
    first, saved = processes.is_first(), workdir / "checkpoints"

    with contextlib.ExitStack() as stack:
        processes.on_first(lambda: _occupy(stack, workdir, plan.objective.product))
        if saved_steps(saved):
            provenance.check_inputs(workdir, inputs)
        restored = restore_newest(saved, plan.state, functools.partial(say, first))
        start = restored[0] if restored else 0
        run_id = provenance.record_start(workdir, resolved(config), provenance.command_line(), inputs) if first else ""
        checkpoints = stack.enter_context(Checkpoints(saved, config.checkpoint.keep))
        report = stack.enter_context(Report(config, workdir, start, show=first, run_id=run_id))
        report.say(describe_job(plan))
        with report.timed("setup"):
            state, frozen = first_state(plan, restored[1] if restored else None)
            if kept is not None:
                place = functools.partial(to_devices, plan)
                corpus = with_features(config, plan.objective, corpus, kept, frozen, place, report.say)
        batches = corpus.batches(config.batch_size, config.seed)
        if restored:
            batches.set_state(restored[2])
            report.say(f"resuming from step {start} of {config.steps}")
        try:
            state = loop(plan, state, frozen, batches, start, evaluate, checkpoints, report, Profiler(workdir, profile))
        except NotFinite as error:
            checkpoints.wait()
            last = checkpoints.latest
            good = (
                f"the last good checkpoint: checkpoint {last} in {saved}"
                if last
                else "no checkpoint had been saved yet"
            )
            raise UserError(f"{error}; {good}") from None
        product = workdir / plan.objective.product
        params = gathered(learnt(state))
        checkpoints.wait()
        processes.on_first(lambda: _finish(plan, workdir, product, params, frozen))
        report.say(f"finished {config.steps} steps; {product} is complete")


def _occupy(stack: contextlib.ExitStack, workdir: Path, product: str) -> None:
    stack.enter_context(provenance.locked(workdir))
    provenance.check_place(workdir, product)


def _finish(plan: Plan, workdir: Path, product: Path, params: Params, frozen: Params | None) -> None:
    plan.objective.export(product, params, frozen)
    provenance.record_finish(workdir)


def say(first: bool, text: str) -> None:
    """One line for the person, from the first process."""
    if first:
        print(text, flush=True)


def fingerprints(plan: Plan, corpus: Corpus) -> dict[str, str]:
    """What the job reads, as a person would call it -> what it is, whatever lies at its path later."""
    data, found = plan.config.data, {}
    for name, split in ((data.split, corpus.train), (data.valid_split, corpus.valid)):
        found[f"the data set {data.path} ({name})"] = fingerprint(split.files)
    if isinstance(corpus, TextCorpus):
        found["the tokenizer"] = corpus.facts.fingerprint
    for key, path in plan.objective.inputs.items():
        if path is not None:
            found[f"{key} ({path})"] = fingerprint([Path(path)])
    return found


def first_state(plan: Plan, restored: State | None) -> tuple[State, Params | None]:
    """State and frozen parameters to begin with: initialised, or as `restored`."""
    objective = plan.objective
    needs_base = plan.base is not None and (plan.frozen is not None or restored is None)
    base = objective.load_base(plan.mesh) if needs_base else None
    frozen = objective.frozen_part(base) if needs_base else None
    if restored is not None:
        return restored, frozen
    initialise = functools.partial(init_state, plan.config, objective, plan.optimizer)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, plan.state)
    return jax.jit(initialise, out_shardings=shardings, compiler_options=unoptimised())(base), frozen


def unoptimised() -> dict[str, int] | None:
    """Compiler options for initial draws: many small ones, which take longer to optimise for a CPU than to make."""
    return {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None


def loop(
    plan: Plan,
    state: State,
    frozen: Params | None,
    batches: Any,
    start: int,
    evaluate: Callable[[Params, Params | None], dict[str, float]],
    checkpoints: Checkpoints,
    report: Report,
    profiler: Profiler,
) -> State:
    """Steps `start` + 1 to the last, with evaluations and checkpoints on their way; returns the last state.

    What belongs to a step (its metrics, its evaluation) is on disk before its checkpoint is, so a resumed run finds
    every line up to the step it restores and drops the lines beyond.
    """
    config = plan.config
    update, made = None, dict[str, Any]()
    for step in range(start + 1, config.steps + 1):
        with report.timed("data"):
            read = next(batches)
            # No checkpoint holds what was made: a run that ended between two refreshes goes on with text of its own.
            if (every := plan.objective.refresh_every) and ((step - 1) % every == 0 or not made):
                made = plan.objective.refresh(state["params"], frozen, read, refresh_key(state))
            batch = to_devices(plan, {**read, **made})
        if update is None:
            with report.timed("compile"):
                update = compiled_step(plan, state, frozen, batch, report.say)
        with profiler.around(step):
            state, metrics = update(state, frozen, batch)
        report.push(step, metrics)
        last = step == config.steps
        if last or step % config.evaluation.every == 0:
            report.flush()
            with report.timed("evaluation"):
                values = evaluate(learnt(state), frozen)
            report.evaluation(step, values)
        if last or step % config.checkpoint.every == 0:
            report.flush()
            with report.timed("checkpoint"):
                if wrong := not_finite(state):
                    raise NotFinite(f"after step {step} {wrong} holds NaN or infinite values")
                checkpoints.save(step, state, batches.get_state())
    return state


def refresh_key(state: State) -> jax.Array:
    """For what an objective draws on the host before the next step; the step's own draws never use it."""
    return beside(jax.random.fold_in(jax.random.wrap_key_data(state["key"]), state["step"]), _REFRESH)


def beside(key: jax.Array, number: int) -> jax.Array:
    """A key that neither a loss nor a part of a batch has: split(key)[i], which they have, is fold_in(key, i)."""
    return jax.random.fold_in(key, np.uint32(2**32 - number))


def on_mesh(mesh: Mesh) -> contextlib.AbstractContextManager:
    """Within it, what is compiled for several devices may say where its arrays lie."""
    return sharding.on_mesh(mesh if mesh.size > 1 else None)


def lowered_step(plan: Plan, state: State, frozen: Params | None, batch: Any) -> Any:
    """`make_step` for arrays, or shapes, of these shardings, ready to be compiled."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, plan.state)
    everywhere = NamedSharding(plan.mesh, PartitionSpec())
    step = jax.jit(make_step(plan), donate_argnums=0, out_shardings=(shardings, everywhere))
    with on_mesh(plan.mesh):
        return step.lower(state, frozen, batch)


def compiled_step(plan: Plan, state: State, frozen: Params | None, batch: Batch, say: Callable[[str], None]):
    """`make_step` compiled ahead for these shardings, so that its time and memory can be told."""
    say("compiling the step ...")
    begin = time.perf_counter()
    compiled = lowered_step(plan, state, frozen, batch).compile()
    memory = compiled.memory_analysis()
    scratch = "" if memory is None else f", {memory.temp_size_in_bytes / 2**20:,.0f} MiB of scratch memory per device"
    say(f"compiled in {time.perf_counter() - begin:.1f} s{scratch}")
    return compiled


def make_evaluation(plan: Plan, corpus: Corpus) -> Callable[[Params, Params | None], dict[str, float]]:
    """The function from (trainable, frozen) to the numbers of one pass over the valid split."""
    config, objective = plan.config, plan.objective
    measure = jax.jit(objective.evaluate)
    for example in corpus.validation(config.batch_size, 1):
        # Traced now, and not again: what is wrong with it shows before the first step, not at the first evaluation.
        whole = {name: jax.ShapeDtypeStruct((config.batch_size, *a.shape[1:]), a.dtype) for name, a in example.items()}
        sums = jax.eval_shape(measure, learnt(plan.state), plan.frozen, whole)
        if not isinstance(sums, dict) or not all(isinstance(v, tuple) and len(v) == 2 for v in sums.values()):
            raise UserError(f"the objective {type(objective).__name__}: evaluate must return name -> (sum, weight)")

    def batches() -> Iterator[Batch]:
        for batch in corpus.validation(config.batch_size, config.evaluation.batches):
            yield to_devices(plan, batch)

    def evaluate(trainable: Params, frozen: Params | None) -> dict[str, float]:
        totals: dict[str, tuple[Any, Any]] = {}
        for batch in batches():
            with on_mesh(plan.mesh):
                sums = jax.device_get(measure(trainable, frozen, batch))
            for name, pair in sums.items():
                total, weight = totals.get(name, (0.0, 0.0))
                totals[name] = total + np.float64(pair[0]), weight + np.float64(pair[1])
        means = {name: total / max(weight, 1.0) for name, (total, weight) in totals.items()}
        return {**objective.report(means), **objective.probe(trainable, frozen, batches())}

    return evaluate


def to_devices(plan: Plan, batch: Mapping[str, Any]) -> Batch:
    """This process's rows as its part of the global batch."""
    return {name: jax.make_array_from_process_local_data(plan.batch_sharding, array) for name, array in batch.items()}


def describe_job(plan: Plan) -> str:
    """One line on the size of the job."""
    config = plan.config
    frozen = f", {count(plan.frozen):,} frozen" if plan.frozen is not None else ""
    rows = f"{config.batch_size} images" if config.length is None else f"{config.batch_size} x {config.length} tokens"
    devices = f"{plan.mesh.size} {plan.mesh.devices.flat[0].platform} device" + "s" * (plan.mesh.size > 1)
    return (
        f"{config.objective.name}: {count(plan.state['params']):,} trainable parameters{frozen}; {config.steps} steps "
        f"of {rows} on {devices}"
    )


def count(tree: Any) -> int:
    """Numbers held by a tree of arrays or shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def gathered(params: Params) -> Params:
    """Parameters that this process can read whole, whichever processes hold their shards."""
    return multihost_utils.process_allgather(params, tiled=True) if processes.count() > 1 else params


def _place(mesh: Mesh, tree: Any) -> Any:
    """Shapes with the shardings that the rules of `models/sharding.py` give them."""
    places = sharding.param_shardings(mesh, tree)
    return jax.tree.map(lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), tree, places)
