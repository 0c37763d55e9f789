"""How fast a training step is: the trainer's own step on random tokens and random weights, with nothing read.

    python -m scripts.accelerator.steps --job NAME [--batch_size N] [--length N] [--remat HOW] --out FILE.json
    python -m scripts.accelerator.steps --job NAME --memory [--largest] [--mesh fsdp=8,tensor=2] --out FILE.json

Writes `compile_seconds`, `step_ms`, `tokens_per_second`, `scratch_gib` and `argument_gib` of the compiled step, and
`mfu`: model FLOPs over time and over the rate of a large product in bfloat16 (on a CPU in float32), measured in the
same run. Model FLOPs are 6 per trainable and 2 per frozen parameter and token, those of embedding tables and attention
apart, and what is computed again counts once; `mfu_palm` counts attention too, as MFU was defined (PaLM, appendix B):
12 L N D T per token where the model is trained and 4 L N D T where it is frozen, drafters' own apart. Of a draft that
is unrolled every step counts, because each goes forward and backward through all that is trained, but for the fusion of
the target's features, with numbers of its own; `mfu_once` counts it as one step. With `--memory` the step is compiled
and not run, from shapes alone, in bfloat16, for this machine's devices
(`XLA_FLAGS=--xla_force_host_platform_device_count=16` simulates some on a CPU), and what it takes of each device is
written. What a step computes again instead of keeping it (`remat`) is a matter of what fits, and so of the job.
"""

import dataclasses
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from eval.images.speed import peak_flop, peak_part
from eval.measure import turns
from eval.measure.environment import describe_environment
from eval.measure.timing import Part, summary
from eval.measure.weights import random_weights
from eval.report.files import write_json
from eval.speed import SHAPES
from models import command_line
from models.command_line import at_least
from models.config import TransformerConfig
from models.errors import exit_on_user_error
from models.formats.hf_config import config_to_hf
from models.formats.tokenizer import Tokenizer
from models.sharding import parse_mesh
from train import trainer
from train.config import parse
from train.dry_run import compiled_sizes
from train.objectives import OBJECTIVES
from train.objectives.target_features import LOGITS

GIB = 2**30
# Of the published shapes one that no single device holds.
LARGEST = dataclasses.replace(SHAPES["llama3-8b"], width=8192, num_layers=80, num_heads=64, mlp_width=28_672)
# And one of 256,000 tokens, whose scores are what a draft model's training has to fit.
_GEMMA = TransformerConfig(
    vocab_size=256_000,
    width=2304,
    num_layers=26,
    num_heads=8,
    num_kv_heads=4,
    head_dim=256,
    mlp_width=9216,
    max_position=8192,
    windows=(4096, None) * 13,
    norm_eps=1e-6,
    tied_embeddings=True,
    embed_scale=True,
    attention_softcap=50.0,
    logit_softcap=30.0,
    post_norms=True,
    zero_centred_norm=True,
    activation="gelu_tanh",
    family="gemma2",
)
_SHAPES = {**SHAPES, "gemma2-2b": _GEMMA}


class Facts(NamedTuple):
    """What a language model asks of a tokenizer."""

    vocab_size: int
    bos_id: int | None
    eos_ids: tuple[int, ...]


class Job(NamedTuple):
    """What is trained.

    Attributes:
      shape: of the target, or of the model itself, by its name in `eval.speed` or here.
      rows, length: of a step, and their tokens.
      objective: its section but for the target, where one is frozen; None is a language model.
      remat: what is computed again: nothing, where all that is kept fits 80 GB beside the rest.
    """

    shape: str
    rows: int
    length: int
    objective: dict[str, Any] | None
    remat: str = "none"


_HEADS = {"name": "draft_heads", "labels": "all", "loop_prompts": 0}
_STUDENT = {"width": 512, "num_layers": 4, "num_heads": 8, "num_kv_heads": 4, "head_dim": 64, "mlp_width": 1408}
_DISTILLED = {"name": "distill", "labels": "all", "loop_prompts": 0, "model": {**_STUDENT, "tied_embeddings": True}}
JOBS = {
    "hydra": Job("llama3-8b", 8, 2048, {**_HEADS, "drafter": "hydra", "heads": {"num_heads": 4}}),
    "eagle3": Job("llama3-8b", 8, 2048, {"name": "eagle3", "labels": "all", "steps": 7, "loop_prompts": 0}, "layers"),
    "lm-110m": Job("110m", 32, 1024, None),
    "lm-1b": Job("llama3-1b", 8, 1024, None),
    "medusa": Job("llama3-8b", 8, 2048, {**_HEADS, "drafter": "medusa", "heads": {"num_heads": 4}}),
    "distill": Job("gemma2-2b", 8, 2048, _DISTILLED, "layers"),
}


def plan_of(
    job: Job, shape: TransformerConfig, batch_size: int, length: int, folder: Path, **settings: Any
) -> trainer.Plan:
    """The job with everything decided and nothing allocated; `folder` receives the target's `config.json`."""
    facts: Any = Facts(shape.vocab_size, shape.bos_id, shape.eos_ids)
    if job.objective is None:
        model = {k: v for k, v in dataclasses.asdict(shape).items() if k not in ("vocab_size", "bos_id", "eos_ids")}
        objective: dict[str, Any] = {"name": "lm", "model": model}
    else:
        facts = Tokenizer.train(["a rehearsal"], 258)
        (folder / "config.json").write_text(json.dumps(config_to_hf(shape)))
        objective = {**job.objective, "target": str(folder)}
        if job.objective["name"] == "eagle3":
            objective["vocabulary"] = min(32_000, shape.vocab_size)
    raw = {
        "objective": objective,
        "data": {"path": "random"},
        "optimizer": {"learning_rate": 1e-4, "warmup_steps": 1},
        "evaluation": {"every": 100},
        "checkpoint": {"every": 100},
        "metrics": {"every": 100},
        "steps": 100,
        "batch_size": batch_size,
        "length": length,
        "remat": job.remat,
        **settings,
    }
    return trainer.make_plan(parse(raw, OBJECTIVES), facts)


def model_flop(plan: trainer.Plan, tokens: int, unrolled: int = 1) -> float:
    """Of one step, whose draft is unrolled so many times."""
    shape = plan.objective.model
    table = shape.vocab_size * shape.width
    # Looking up rows costs nothing; scores do, where they are read.
    unread = table * (0 if shape.tied_embeddings else 1)
    trainable, frozen = trainer.count(plan.state["params"]), 0
    if plan.frozen is None:
        trainable -= unread
    else:
        frozen = trainer.count(plan.frozen) - table - unread
        frozen += table if LOGITS in plan.objective.target_taps else 0
    if unrolled > 1:
        once = trainer.count(plan.state["params"]["fc"])
        trainable = once + unrolled * (trainable - once)
    return tokens * (6 * trainable + 2 * frozen)


def attention_flop(plan: trainer.Plan, tokens: int, length: int) -> float:
    """Of one step on rows of `length` tokens: products of queries with all keys, and of these scores with values."""
    shape = plan.objective.model
    forward = 4 * shape.num_layers * shape.num_heads * shape.head_dim * length
    return tokens * forward * (3 if plan.frozen is None else 1)


@dataclasses.dataclass
class Running:
    """A job's compiled step and what it takes.

    Attributes:
      plan: the job.
      step: the program.
      state, frozen, inputs: its arguments, of random weights and tokens.
      compile_seconds: what making it took.
    """

    plan: trainer.Plan
    step: Any
    state: Any
    frozen: Any
    inputs: Any
    compile_seconds: float

    @classmethod
    def of(cls, job: Job, shape: TransformerConfig, batch_size: int, length: int, **settings: Any) -> "Running":
        """The job's, compiled for this device; `settings` are of its config."""
        with tempfile.TemporaryDirectory() as folder:
            plan = plan_of(job, shape, batch_size, length, Path(folder), **settings)
            if plan.base is not None:
                base = random_weights(plan.base, jax.random.key(0))
                plan.objective.load_base = lambda mesh: base  # type: ignore[method-assign]
            state, frozen = trainer.first_state(plan, None)
        rng = np.random.default_rng(0)
        rows = (batch_size, length)
        batch = {
            "tokens": rng.integers(0, shape.vocab_size, rows, np.int32),
            "segments": np.ones(rows, np.int32),
            "mask": np.ones(rows, np.uint8),
        }
        inputs = trainer.to_devices(plan, batch)
        began = time.perf_counter()
        step = trainer.compiled_step(plan, state, frozen, inputs, lambda line: print(line, flush=True))
        return cls(plan, step, state, frozen, inputs, time.perf_counter() - began)

    def run(self) -> dict[str, Any]:
        """One step, to its end; its metrics."""
        self.state, metrics = self.step(self.state, self.frozen, self.inputs)
        return jax.block_until_ready(metrics)


def measure(job: Job, shape: TransformerConfig, batch_size: int, length: int, rounds: int) -> dict[str, Any]:
    """Compiles the step, runs it, and says how fast that was."""
    running = Running.of(job, shape, batch_size, length)
    memory, seconds, product = running.step.memory_analysis(), [], _product()
    with turns.alone():
        for _ in range(rounds + 1):
            began = time.perf_counter()
            metrics = running.run()
            seconds.append(time.perf_counter() - began)
        peak = peak_flop() / min(product.sample() for _ in range(rounds + 1))
    taken = summary(seconds[1:])
    tokens, unrolled = batch_size * length, (job.objective or {}).get("steps", 1)
    possible = taken.median / 1e3 * peak
    of_parameters = model_flop(running.plan, tokens, unrolled)
    return {
        "loss": float(metrics["loss"]),
        "compile_seconds": running.compile_seconds,
        "step_ms": taken.median,
        "step_ms_min": taken.minimum,
        "tokens_per_second": 1e3 * tokens / taken.median,
        "peak_tflop_per_s": peak / 1e12,
        "mfu": of_parameters / possible,
        "mfu_palm": (of_parameters + attention_flop(running.plan, tokens, length)) / possible,
        **({"mfu_once": model_flop(running.plan, tokens) / possible} if unrolled > 1 else {}),
        "scratch_gib": memory.temp_size_in_bytes / GIB,
        "argument_gib": memory.argument_size_in_bytes / GIB,
    }


def sizes_of(job: Job, shape: TransformerConfig, batch_size: int, length: int, mesh: dict[str, int]) -> dict[str, Any]:
    """What the compiled step takes of each device of a mesh."""
    with tempfile.TemporaryDirectory() as folder:
        plan = plan_of(job, shape, batch_size, length, Path(folder), mesh=mesh, precision="bfloat16")
        row = {"tokens": np.int32, "segments": np.int32, "mask": np.uint8}
        found = compiled_sizes(plan, {name: ((length,), dtype) for name, dtype in row.items()})
    return {
        "compile_seconds": found.seconds,
        **{f"{name}_gb": size / 1e9 for name, size in found.bytes.items()},
        "largest": [{"shape": array, "gb": size / 1e9, "times": times} for size, array, times in found.arrays[:5]],
        "cpu_stands_in": found.stands_in,
    }


def _product() -> Part:
    """Large products, compiled."""
    part = peak_part(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
    part.prepare()
    return part


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """The command; see the module's docstring."""
    parser = command_line.parser("scripts.accelerator.steps", __doc__)
    parser.add_argument("--job", required=True, choices=list(JOBS), help="what is trained")
    parser.add_argument("--batch_size", type=at_least(1), help="rows of a step (by the job)")
    parser.add_argument("--length", type=at_least(2), help="tokens of a row (by the job)")
    parser.add_argument("--memory", action="store_true", help="compile the step and tell its memory; run nothing")
    parser.add_argument("--largest", action="store_true", help="heads of a target of the Llama-3-70B shape")
    parser.add_argument("--mesh", default="data=1", help="with --memory: its axes, such as fsdp=8,tensor=2")
    parser.add_argument("--remat", choices=["none", "products", "layers"], help="what is computed again (by the job)")
    parser.add_argument("--rounds", type=at_least(1), default=5, help="steps that are timed")
    parser.add_argument("--tiny", action="store_true", help="with a tiny shape")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args(argv)
    job = JOBS[args.job]
    job = job._replace(
        remat=args.remat or job.remat, rows=args.batch_size or job.rows, length=args.length or job.length
    )
    name = "tiny" if args.tiny else job.shape
    shape = _SHAPES[name]
    if args.tiny:
        shape = dataclasses.replace(shape, vocab_size=512)  # Bytes do not fit into its own.
    asked = {"job": args.job, "shape": name, "batch_size": job.rows, "length": job.length, "remat": job.remat}
    if args.memory:
        if args.largest:
            shape, asked["shape"] = LARGEST, "llama3-70b"
        found = sizes_of(job, shape, job.rows, job.length, dict(parse_mesh(args.mesh).shape))
        asked["mesh"] = args.mesh
    else:
        turns.join()
        found = measure(job, shape, job.rows, job.length, args.rounds)
    write_json({"environment": describe_environment(), **asked, **found}, args.out)
    print(", ".join(f"{key} {value:.4g}" for key, value in found.items() if isinstance(value, float)))


if __name__ == "__main__":
    main()
