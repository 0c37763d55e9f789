"""How near the machine's limit decoding is, on a named shape with random weights; everything in one interleaved run.

    python -m eval.speed [--shape 110m|DIR] [--sections SECTION,...] [--drafters NAME,...] [--out FILE.json]
    python -m eval.speed --sections images [--image_depths 16,8] [--image_batch 2] [--out FILE.json]

Prints and saves, with the terms of `eval/text/benchmark.py`:

    bandwidth_gb_per_s   read rate of a reduction or a matrix-vector product over 1 GiB (10^9 bytes/s), whichever is
                         faster in the median, and `bandwidth_best_gb_per_s` in the best round: where other tenants
                         share the memory the two lie far apart, so medians are compared with medians
    rows                 list of {rows, ms}: the target's forward on that many rows
    plain                {ms_per_token, bandwidth_share}: plain decoding in the fused loop, and the bytes of weights
                         that a token reads, over the time it takes, over the bandwidth (`..._best`: in the best rounds)
    drafters             name -> {tree_nodes, draft_ms, verify_ms, commit_ms, update_ms, step_ms, loop_efficiency, ...}:
                         the parts of a step run alone, and the step in the fused loop. `verify_ms` is the target's
                         forward on the tree (`forward_ms`) and the verdict (`verdict_ms`); `network_ms` is `draft_ms`
                         without the choice of candidates (timed alone); `step_over_forwards` is step_ms over the sum
                         of forward_ms and network_ms; `overhead_share` is what verdict, commit and update take of a
                         step, and `sampled` holds these and the step at temperature 1 with top-p 0.9 (not with
                         `--greedy`, which halves the programs)
    replay               list of {nodes, ms_per_token, forward_ms, acceptance_length, speedup, loop_efficiency,
                         settled}: decodes whose candidates cost nothing and are accepted at a rate of 0.8, in chains of
                         so many rows; settled, if to the end of the text (`eval/measure/replay.py`)
    growth               list of {batch, context, drafters: name -> {step_ms, compile_seconds}}: the fused loop's step
                         as batch and context grow, and its compilation, or None where it was compiled before. On an
                         accelerator the loops of a scene compile side by side, and it is the time of their slowest
    huggingface          {ms_per_token} of transformers' `generate` on the same shape, prompt length and kind of device,
                         with its dynamic cache, and huggingface_static with its static one, for which it compiles on a
                         GPU; null where torch and transformers are not installed for that device
    images               on request and alone: see `eval/images/speed.py`
    shape, environment   what was measured, and on what

Times are medians over rounds, in milliseconds; `..._min` beside them are minima. With random weights hardly a draft is
accepted, which changes how long a step takes by next to nothing, and loop efficiency not at all: tokens per step
cancel.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from decoding.drafter import Drafter
from decoding.drafters.oracle import Oracle
from decoding.drafters.plain import Plain
from decoding.generate import bucket
from decoding.sampling import Sampling
from eval.images.speed import describe as describe_images
from eval.images.speed import run_images
from eval.measure import turns
from eval.measure.bandwidth import bandwidth_block, block_side, bytes_per_token, matrix_vector, reduction
from eval.measure.environment import describe_environment
from eval.measure.lineup import DRAFTERS
from eval.measure.parts import Scene, Step, network_ms, rows_forward, step_parts
from eval.measure.progress import Progress
from eval.measure.replay import Replay, efficiency
from eval.measure.timing import Part, Prepared, Timed, Timing, measure, prepare_together
from eval.measure.weights import random_weights
from eval.peers import text as peer
from eval.report.files import make_directory, write_json
from eval.report.speed import describe
from models import command_line, processes
from models.command_line import add_distributed, add_overwrite, at_least, keep_files, like, listed, numbers
from models.config import TransformerConfig
from models.errors import UserError, exit_on_user_error
from models.formats.hf import load_config
from models.pages import in_huge_pages
from models.transformer import for_decoding, init

SHAPES = {
    "110m": TransformerConfig(
        vocab_size=32_000,
        width=768,
        num_layers=12,
        num_heads=12,
        num_kv_heads=12,
        head_dim=64,
        mlp_width=2048,
        max_position=1024,
        tied_embeddings=True,
    ),
    "llama3-8b": TransformerConfig(
        vocab_size=128_256,
        width=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        mlp_width=14_336,
        max_position=8192,
        rope_theta=500_000.0,
    ),
    "llama3-1b": TransformerConfig(
        vocab_size=128_256,
        width=2048,
        num_layers=16,
        num_heads=32,
        num_kv_heads=8,
        head_dim=64,
        mlp_width=8192,
        max_position=8192,
        rope_theta=500_000.0,
        tied_embeddings=True,
    ),
    "tiny": TransformerConfig(
        vocab_size=256,
        width=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        mlp_width=64,
        max_position=512,
        tied_embeddings=True,
    ),
}


PEERS = {"huggingface": False, "huggingface_static": True}  # Whether with a static cache.
SECTIONS = ("bandwidth", "rows", "plain", "drafters", "replay", "growth", *PEERS)
IMAGES = "images"  # Only asked for alone: it shares no model with the others.
SAMPLED = Sampling(temperature=1.0, top_p=0.9)
# Batch and context of the growth section, and the drafters that it follows, all in memory at once: the caches of 16
# texts of 4096 tokens would take 20 GB.
SCENES = tuple((batch, context) for batch in (1, 4, 16) for context in (128, 1024, 4096) if batch * context <= 2**14)
FOLLOWED = ("hydra", "eagle2", "token_recycling")
ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
PROMPT_LENGTH = 128
STEPS_PER_GROWTH_SAMPLE = 3
ORACLE_NODES = (1, 2, 4, 8, 16, 32, 64, 128)
ORACLE_TOKENS = 256
ORACLE_RATE = 0.8
PEER_TOKENS = 16
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Scale:
    """What the sections go through.

    Attributes:
      rows: of the target's forward.
      nodes: of the oracle's chains, 1 first.
      scenes: batch and context of the growth section.
      greedy: leaves out drafters' steps at temperature 1.
    """

    rows: Sequence[int] = ROWS
    nodes: Sequence[int] = ORACLE_NODES
    scenes: Sequence[tuple[int, int]] = SCENES
    greedy: bool = False

    def __post_init__(self):
        for name, given in (("rows", self.rows), ("nodes", self.nodes), ("scenes", sum(self.scenes, ()))):
            if not given or min(given) < 1:
                raise UserError(f"--{name} must be numbers of at least 1, got {', '.join(map(str, given)) or 'none'}")
        if self.nodes[0] != 1:
            raise UserError(f"--nodes must begin with 1, plain decoding, got {self.nodes[0]}")


def check_shape(shape: str) -> TransformerConfig:
    """The shape of a name in `SHAPES`, or of a target directory. Raises UserError for any other, and where it has an
    encoder."""
    if shape in SHAPES:
        return SHAPES[shape]
    if not (Path(shape) / "config.json").is_file():
        raise UserError(f"there is no shape {shape!r}, only {', '.join(SHAPES)} or a target directory")
    config = load_config(shape)
    if config.encoder_layers:
        raise UserError(f"{shape} is an encoder-decoder, and what is timed here are decoders' steps behind a text")
    return config


def run(
    shape: str = "110m",
    sections: Sequence[str] = SECTIONS,
    drafters: Sequence[str] = tuple(DRAFTERS),
    rounds: int = 9,
    bandwidth_bytes: int = GIB,
    scale: Scale | None = None,
    progress: Callable[[str], None] = lambda line: None,
    keep: Callable[[dict[str, Any]], None] = lambda results: None,
) -> dict[str, Any]:
    """Measures.

    Args:
      shape: a name in `SHAPES`, or a target directory, whose config is taken and whose weights are not.
      sections: of `SECTIONS`; what one needs of another is measured too.
      drafters: of `DRAFTERS`.
      rounds: samples of each timing.
      bandwidth_bytes: size of what the bandwidth is read from.
      scale: how many rows, nodes, texts and tokens the sections go through; None is the default.
      progress: told what is being done.
      keep: given the results so far, whenever there are more; scenes of `growth` come one by one.

    Returns:
      The keys that the module's docstring lists, for the sections asked for.

    Raises:
      UserError: an unknown shape, section or drafter.
    """
    config = check_shape(shape)
    for kind, names, known in (("section", sections, SECTIONS), ("drafter", drafters, tuple(DRAFTERS))):
        for name in names:
            if name not in known:
                raise UserError(f"there is no {kind} {name!r}, only {', '.join(known)}")
    if rounds < 1:
        raise UserError(f"rounds must be at least 1, got {rounds}")
    dtype = _dtype()
    progress(f"making the {shape} shape")
    # Joined, as `load_target` hands them to the loop.
    shapes = jax.eval_shape(lambda key: for_decoding(init(config, key, dtype)), jax.random.key(0))
    params = in_huge_pages(random_weights(shapes, jax.random.key(0)))
    maker = _Maker(config, params, progress)
    scale = scale or Scale()
    parts = _parts(maker, sections, drafters, bandwidth_bytes, scale)
    _prepare([part for part in parts.values() if isinstance(part, Part | Replay | Step)], progress)
    timings = measure(parts, rounds, progress)
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    results = {
        "shape": {"name": shape, "parameters": size, "dtype": dtype.__name__},
        **_summarise(maker, sections, drafters, bandwidth_bytes, timings),
        "environment": describe_environment(),
    }
    if "replay" in sections:
        results["replay"] = _replay_entries(parts, timings, scale.nodes)
    keep(results)
    for batch, context in scale.scenes if "growth" in sections else ():
        progress(f"batch {batch}, context {context}")
        scene = _growth(maker, drafters, rounds, batch, context, progress)
        results.setdefault("growth", []).append(scene)
        keep(results)
    return results


def _prepare(parts: Sequence[Prepared], progress: Callable[[str], None]) -> None:
    """On an accelerator, whose programs take long to compile; a processor's would share what they are timed on."""
    if jax.default_backend() != "cpu":
        progress(f"compiling {len(parts)} programs side by side")
        prepare_together(parts)


def _dtype() -> Any:
    """Of everything that is measured: what the backend is fast in."""
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16


class _Maker:
    """Makes drafters with random parameters for the shape, each once."""

    def __init__(self, config: TransformerConfig, params: Any, progress: Callable[[str], None]):
        self.config, self.params, self._progress = config, params, progress
        self._made: dict[str, tuple[Drafter, Any]] = {"none": (Plain(), None)}

    def __call__(self, name: str) -> tuple[Drafter, Any]:
        if name not in self._made:
            self._progress(f"making {name}")
            drafter = DRAFTERS[name](self.config)

            def fresh(key):
                return drafter.for_decoding(drafter.init_params(self.config, self.params, key))

            key = jax.random.key(1)
            self._made[name] = drafter, in_huge_pages(random_weights(jax.eval_shape(fresh, key), key))
        return self._made[name]

    def scene(self, names: Sequence[str], context: int = PROMPT_LENGTH, batch: int = 1) -> Scene:
        """Room for any of them."""
        deepest = max((self(name)[0].max_depth for name in names), default=0)
        return Scene.with_room(self.config, self.params, context, deepest, batch)


def _parts(maker: _Maker, sections, drafters, bandwidth_bytes, scale: Scale) -> dict[str, Timed]:
    """Everything that the sections need, by a name that says what it is."""
    wanted = set(sections)
    scene = maker.scene(drafters if "drafters" in wanted else ())
    parts: dict[str, Timed] = {}
    if wanted & {"bandwidth", "plain"}:
        block = bandwidth_block(bandwidth_bytes)
        parts |= {"reduction": reduction(block), "matvec": matrix_vector(block)}
    counts = sorted({1, *scale.rows}) if "rows" in wanted else (1,) if "drafters" in wanted else ()
    parts |= {f"rows {count}": rows_forward(scene, count) for count in counts}
    if wanted & {"plain", "drafters"}:
        parts["plain"] = Step(scene, Plain(), None)
    for name in drafters if "drafters" in wanted else ():
        parts |= {f"{name} {part}": timed for part, timed in step_parts(scene, *maker(name)).items()}
        if scale.greedy:
            continue
        warm = step_parts(dataclasses.replace(scene, sampling=SAMPLED), *maker(name))
        parts |= {
            f"{name} sampled {part}": warm[part] for part in ("verdict", "commit", "update", "step") if part in warm
        }
    if "replay" in wanted:
        parts |= _replays(maker, scale.nodes)
    for name, static in PEERS.items() if peer.is_installed() else ():
        if name in wanted:
            prompt = maker.scene(()).tokens(PROMPT_LENGTH)[0].tolist()
            parts[name] = peer.HuggingFace(maker.config, prompt, PEER_TOKENS, _dtype().__name__, static)
    return parts


def _replays(maker: _Maker, counts: Sequence[int]) -> dict[str, Timed]:
    """Replays, and the target's forward on their rows, all with caches of one size."""
    known = PROMPT_LENGTH + ORACLE_TOKENS + 1
    scene = Scene(maker.config, maker.params, PROMPT_LENGTH, bucket(known + max(counts)))

    def told(text, rate):
        return {"text": text[:known], "rate": jnp.float32(rate)}

    parts: dict[str, Timed] = {}
    first = None
    for nodes in counts:
        drafter = Oracle(nodes - 1, known) if nodes > 1 else Plain()
        params_of = told if nodes > 1 else lambda text, rate: None
        replay = Replay(scene, drafter, params_of, ORACLE_TOKENS, ORACLE_RATE, after=first)
        first = first or replay
        parts |= {f"replay {nodes}": replay, f"replay rows {nodes}": rows_forward(scene, nodes)}
    return parts


def _replay_entries(parts: dict[str, Timed], timings: dict[str, Timing], counts: Sequence[int]) -> list[dict[str, Any]]:
    first = counts[0]
    base = timings[f"replay {first}"], timings[f"replay rows {first}"]
    entries = []
    for nodes in counts:
        replay, mine, wide = parts[f"replay {nodes}"], timings[f"replay {nodes}"], timings[f"replay rows {nodes}"]
        assert isinstance(replay, Replay)
        found = efficiency(*base, mine, wide, replay.acceptance_length)
        entries.append({"nodes": nodes, **found, "settled": replay.settled})
    return entries


def _followed(drafters: Sequence[str]) -> tuple[str, ...]:
    return tuple(name for name in FOLLOWED if name in drafters)


def _growth(
    maker: _Maker,
    drafters: Sequence[str],
    rounds: int,
    batch: int,
    context: int,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """One scene, because the caches of all would not fit into memory together; interleaved as ever."""
    names = ("none", *_followed(drafters))
    scene = maker.scene(_followed(drafters), context, batch)
    steps = {name: Step(scene, *maker(name), steps=STEPS_PER_GROWTH_SAMPLE) for name in names}
    _prepare(list(steps.values()), progress)
    timings = measure(dict(steps), rounds, progress)
    entries = {
        name: {**_ms("step_ms", timings[name]), "compile_seconds": _compile_seconds(step, timings[name])}
        for name, step in steps.items()
    }
    return {"batch": batch, "context": context, "drafters": entries}


def _summarise(maker: _Maker, sections, drafters, bandwidth_bytes, timings: dict[str, Timing]) -> dict[str, Any]:
    results: dict[str, Any] = {}
    if "reduction" in timings:
        size = 4 * block_side(bandwidth_bytes) ** 2
        rates = {name: size / timings[name].median / 1e6 for name in ("reduction", "matvec")}
        bandwidth, best = max(rates.values()), size / min(timings[name].minimum for name in rates) / 1e6
    if "bandwidth" in sections:
        results["bandwidth_gb_per_s"], results["bandwidth_best_gb_per_s"] = bandwidth, best
        results["bandwidth_by_kind_gb_per_s"] = rates
    if "rows" in sections:
        counts = [int(name.removeprefix("rows ")) for name in timings if name.startswith("rows ")]
        results["rows"] = [{"rows": count, **_ms("ms", timings[f"rows {count}"])} for count in counts]
    if "plain" in sections:
        per_token = bytes_per_token(maker.config, maker.params)
        rate = per_token / timings["plain"].median / 1e6
        results["plain"] = {
            **_ms("ms_per_token", timings["plain"]),
            "bandwidth_share": rate / bandwidth,
            "bandwidth_share_best": per_token / timings["plain"].minimum / 1e6 / best,
            "megabytes_per_token": per_token / 1e6,
        }
    if "drafters" in sections:
        results["drafters"] = {name: _drafter(name, maker(name)[0].max_nodes, timings) for name in drafters}
    for name in PEERS:
        if name in sections:
            results[name] = _ms("ms_per_token", timings[name]) if name in timings else None
    return results


def _compile_seconds(step: Step, timing: Timing) -> float | None:
    """What the first sample took beyond a usual one; None where the program had been compiled before."""
    usual = STEPS_PER_GROWTH_SAMPLE * timing.median / 1e3
    return None if step.first_seconds is None else max(0.0, step.first_seconds - usual)


def _drafter(name: str, nodes: int, timings: dict[str, Timing]) -> dict[str, Any]:
    part = {key.removeprefix(f"{name} "): timing for key, timing in timings.items() if key.startswith(f"{name} ")}
    # A drafter without state has nothing to update.
    nothing = Timing(0.0, 0.0)
    part = {"update": nothing, "sampled update": nothing, **part}
    median = {key: timing.median for key, timing in part.items()}
    network = network_ms(part)
    forwards = median["forward"] + network
    # Measured speed-up over the ideal one; the tokens per step are in both.
    efficiency = (timings["plain"].median / median["step"]) / (timings["rows 1"].median / forwards)
    return {
        "tree_nodes": nodes,
        **_ms("draft_ms", part["draft"]),
        "verify_ms": median["forward"] + median["verdict"],
        "verify_ms_min": part["forward"].minimum + part["verdict"].minimum,
        **_ms("commit_ms", part["commit"]),
        **_ms("update_ms", part["update"]),
        **_ms("step_ms", part["step"]),
        **_ms("forward_ms", part["forward"]),
        "network_ms": network,
        **_ms("verdict_ms", part["verdict"]),
        "overhead_share": _overhead(median, ""),
        "step_over_forwards": median["step"] / forwards,
        "draft_share": median["draft"] / median["step"],
        "loop_efficiency": efficiency,
        **({"sampled": _sampled(median)} if "sampled step" in median else {}),
    }


def _sampled(median: dict[str, float]) -> dict[str, float]:
    steps = {f"{key}_ms": median[f"sampled {key}"] for key in ("verdict", "commit", "update", "step")}
    return {**steps, "overhead_share": _overhead(median, "sampled ")}


def _overhead(median: dict[str, float], mode: str) -> float:
    """What is neither drafting nor the target's forward, over the step."""
    return sum(median[mode + key] for key in ("verdict", "commit", "update")) / median[f"{mode}step"]


def _ms(key: str, timing: Timing) -> dict[str, float]:
    return {key: timing.median, f"{key}_min": timing.minimum}


def _scenes(text: str) -> list[tuple[int, int]]:
    pair = like(r"(\d+)x(\d+)", "BATCHxCONTEXT, such as 16x1024", lambda found: (int(found[0]), int(found[1])))
    return [pair(part) for part in text.split(",")]


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """The command; see the module's docstring."""
    parser = command_line.parser("eval.speed", __doc__)
    parser.add_argument("--shape", default="110m", help=f"one of {', '.join(SHAPES)}, or a target directory")
    parser.add_argument(
        "--sections", type=listed, default=",".join(SECTIONS), help=f"comma-separated; or {IMAGES} alone"
    )
    parser.add_argument("--drafters", type=listed, default=",".join(DRAFTERS), help="comma-separated")
    depths = like(r"(\d+),(\d+)", "two depths, the deeper first, such as 30,16", lambda found: tuple(map(int, found)))
    parser.add_argument("--image_depths", type=depths, default="16,8", help="of both VAR models, deeper first")
    scales = like(
        r"none|(\d+(?:,\d+)*)",
        "numbers such as 8,6, or none",
        lambda found: tuple(map(int, (found[0] or "").split(",") if found[0] else ())),
    )
    parser.add_argument("--draft_scales", type=scales, default="8,6", help="of collaborating VAR models, or none")
    parser.add_argument("--image_batch", type=at_least(1), default=2, help="images made together")
    parser.add_argument("--rows", type=numbers(int), default=Scale.rows, help="of the target's forward")
    parser.add_argument("--nodes", type=numbers(int), default=Scale.nodes, help="of the oracle's chains, 1 first")
    parser.add_argument("--scenes", type=_scenes, default=Scale.scenes, help="BATCHxCONTEXT,... of the section growth")
    parser.add_argument("--greedy", action="store_true", help="leave out drafters' steps at temperature 1")
    parser.add_argument("--rounds", type=at_least(1), default=9, help="samples of each timing")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    add_overwrite(parser)
    add_distributed(parser)
    args = parser.parse_args(argv)
    processes.start(args.distributed)
    if args.out is not None and args.out.is_dir():
        raise UserError(f"cannot write {args.out}: it is a directory, expected a JSON file")
    keep_files([args.out], args.overwrite)
    turns.join()

    def keep(results: dict[str, Any]) -> None:
        if args.out is not None:
            make_directory(args.out.parent)
            write_json(results, args.out)

    with Progress() as progress:
        if args.sections == [IMAGES]:
            shapes = {"depths": args.image_depths, "draft_scales": args.draft_scales}
            shapes |= {"batch": args.image_batch, "dtype": _dtype()}
            results = {"images": run_images(args.rounds, **shapes, progress=progress)}
            results["environment"] = describe_environment()
            keep(results)
        else:
            scale = Scale(args.rows, args.nodes, args.scenes, args.greedy)
            results = run(
                args.shape, args.sections, args.drafters, args.rounds, scale=scale, progress=progress, keep=keep
            )
    print("\n".join(describe_images(results["images"])) if args.sections == [IMAGES] else describe(results))
    if args.out is not None:
        print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
