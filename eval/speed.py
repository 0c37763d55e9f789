"""How near the machine's limit decoding is, on a named shape with random weights; everything in one interleaved run.

    python -m eval.speed [--shape 110m] [--sections bandwidth,rows,plain,drafters,huggingface] [--out FILE.json]

Prints and saves, with the terms of `eval/benchmark.py`:

    bandwidth_gb_per_s   best read rate that a reduction or a matrix-vector product over 1 GiB reaches (10^9 bytes/s)
    rows                 list of {rows, ms}: the target's forward on that many rows
    plain                {ms_per_token, bandwidth_share}: plain decoding in the fused loop, and the bytes of weights
                         that a token reads, over the time it takes, over the bandwidth
    drafters             name -> {tree_nodes, draft_ms, verify_ms, commit_ms, update_ms, step_ms, loop_efficiency, ...}:
                         the parts of a step run alone, and the step in the fused loop. `verify_ms` is the target's
                         forward on the tree (`forward_ms`) and the verdict (`verdict_ms`); `network_ms` is `draft_ms`
                         without the choice of candidates (timed alone); `step_over_forwards` is step_ms over the sum
                         of forward_ms and network_ms
    huggingface          {ms_per_token} of transformers' `generate` on the same shape and prompt length, where torch and
                         transformers are installed, else null
    shape, environment   what was measured, and on what

Times are medians over rounds, in milliseconds; `..._min` beside them are minima. With random weights hardly a draft is
accepted, which changes how long a step takes by next to nothing, and loop efficiency not at all: tokens per step
cancel.
"""

import argparse
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from decoding.drafters.heads import HeadDrafter
from decoding.drafters.hydra import Hydra
from decoding.drafters.medusa import Medusa
from decoding.drafters.plain import Plain
from eval import peer
from eval.environment import describe_environment
from eval.parts import Scene, Step, network_ms, rows_forward, step_parts
from eval.progress import Progress
from eval.results import write_json
from eval.timing import Part, Timed, Timing, measure
from models.config import TransformerConfig
from models.errors import UserError, exit_on_user_error
from models.heads.hydra import HydraHeads
from models.heads.medusa import MedusaHeads
from models.transformer import Params, init, join_projections

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
DRAFTERS: dict[str, HeadDrafter] = {
    "medusa": Medusa(MedusaHeads()),
    "hydra": Hydra(HydraHeads()),
    "hydra++": Hydra(HydraHeads(num_layers=4, prefix=True)),
}
SECTIONS = ("bandwidth", "rows", "plain", "drafters", "huggingface")
ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
PROMPT_LENGTH = 128
PEER_TOKENS = 16
GIB = 2**30


def run(
    shape: str = "110m",
    sections: Sequence[str] = SECTIONS,
    rounds: int = 9,
    bandwidth_bytes: int = GIB,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measures.

    Args:
      shape: a name in `SHAPES`.
      sections: of `SECTIONS`; what one needs of another is measured too.
      rounds: samples of each timing.
      bandwidth_bytes: size of what the bandwidth is read from.
      progress: told what is being done.

    Returns:
      The keys that the module's docstring lists, for the sections asked for.

    Raises:
      UserError: an unknown shape or section.
    """
    if shape not in SHAPES:
        raise UserError(f"there is no shape {shape!r}, only {', '.join(SHAPES)}")
    for section in sections:
        if section not in SECTIONS:
            raise UserError(f"there is no section {section!r}, only {', '.join(SECTIONS)}")
    if rounds < 1:
        raise UserError(f"rounds must be at least 1, got {rounds}")
    config = SHAPES[shape]
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    progress(f"making the {shape} shape")
    # Joined, as `load_target` hands them to the loop.
    params = jax.jit(lambda key: join_projections(init(config, key, dtype)))(jax.random.key(0))
    parts = _parts(config, params, sections, bandwidth_bytes, progress)
    timings = measure(parts, rounds, progress)
    return {
        "shape": {
            "name": shape,
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
            "dtype": dtype.__name__,
        },
        **_summarise(config, params, sections, bandwidth_bytes, timings),
        "environment": describe_environment(),
    }


def _parts(config, params, sections, bandwidth_bytes, progress) -> dict[str, Timed]:
    """Everything that the sections need, by a name that says what it is."""
    wanted = set(sections)
    deepest = max(drafter.max_depth for drafter in DRAFTERS.values())
    scene = Scene.with_room(config, params, PROMPT_LENGTH, deepest)
    parts: dict[str, Timed] = {}
    if wanted & {"bandwidth", "plain"}:
        block = bandwidth_block(bandwidth_bytes)
        parts |= {"reduction": reduction(block), "matvec": matrix_vector(block)}
    counts = ROWS if "rows" in wanted else (1,) if "drafters" in wanted else ()
    parts |= {f"rows {count}": rows_forward(scene, count) for count in counts}
    if wanted & {"plain", "drafters"}:
        parts["plain"] = Step(scene, Plain(), None)
    for name, drafter in DRAFTERS.items() if "drafters" in wanted else ():
        progress(f"making {name}")
        heads = jax.jit(lambda key, drafter=drafter: drafter.heads.init(config, params, key))(jax.random.key(1))
        parts |= {f"{name} {part}": timed for part, timed in step_parts(scene, drafter, heads).items()}
    if "huggingface" in wanted and peer.is_installed():
        progress("making the transformers model")
        prompt = scene.tokens(PROMPT_LENGTH)[0].tolist()
        parts["huggingface"] = peer.HuggingFace(config, prompt, PEER_TOKENS)
    return parts


def bandwidth_block(size: int) -> Float[Array, "R C"]:
    """A square matrix of at most `size` bytes, to be read."""
    return jnp.ones((block_side(size),) * 2, jnp.float32)


def block_side(size: int) -> int:
    """Side of a square of `size` bytes of float32."""
    return math.isqrt(size // 4)


def reduction(block: Float[Array, "R C"]) -> Part:
    """Reads a matrix once, for the maximum of each row, whose terms may come in any order and so are vectorised."""

    def rows(block, least_R):
        return jnp.max(jnp.maximum(block, least_R[:, None]), axis=1)

    return Part.of(rows, block, jnp.zeros(block.shape[0]))


def matrix_vector(block: Float[Array, "R C"]) -> Part:
    """Reads a matrix once, for its product with a vector."""
    return Part.of(lambda block, vector_C: block @ vector_C, block, jnp.ones(block.shape[1]))


def bytes_per_token(config: TransformerConfig, params: Params) -> int:
    """Bytes of weights that decoding one token reads: all but an embedding table of which it needs a single row."""
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    return total if config.tied_embeddings else total - params["embed"]["embedding"].nbytes


def _summarise(config, params, sections, bandwidth_bytes, timings: dict[str, Timing]) -> dict[str, Any]:
    results: dict[str, Any] = {}
    if "reduction" in timings:
        size = 4 * block_side(bandwidth_bytes) ** 2
        bandwidth = size / min(timings[name].minimum for name in ("reduction", "matvec")) / 1e6
    if "bandwidth" in sections:
        results["bandwidth_gb_per_s"] = bandwidth
        rates = {name: size / timings[name].minimum / 1e6 for name in ("reduction", "matvec")}
        results["bandwidth_by_kind_gb_per_s"] = rates
    if "rows" in sections:
        results["rows"] = [{"rows": count, **_ms("ms", timings[f"rows {count}"])} for count in ROWS]
    if "plain" in sections:
        per_token = bytes_per_token(config, params)
        rate = per_token / timings["plain"].median / 1e6
        results["plain"] = {
            **_ms("ms_per_token", timings["plain"]),
            "bandwidth_share": rate / bandwidth,
            "megabytes_per_token": per_token / 1e6,
        }
    if "drafters" in sections:
        results["drafters"] = {name: _drafter(name, timings) for name in DRAFTERS}
    if "huggingface" in sections:
        found = timings.get("huggingface")
        results["huggingface"] = _ms("ms_per_token", found) if found else None
    return results


def _drafter(name: str, timings: dict[str, Timing]) -> dict[str, Any]:
    part = {key.removeprefix(f"{name} "): timing for key, timing in timings.items() if key.startswith(f"{name} ")}
    median = {key: timing.median for key, timing in part.items()}
    network = network_ms(part)
    forwards = median["forward"] + network
    # Measured speed-up over the ideal one; the tokens per step are in both.
    efficiency = (timings["plain"].median / median["step"]) / (timings["rows 1"].median / forwards)
    return {
        "tree_nodes": DRAFTERS[name].max_nodes,
        **_ms("draft_ms", part["draft"]),
        "verify_ms": median["forward"] + median["verdict"],
        "verify_ms_min": part["forward"].minimum + part["verdict"].minimum,
        **_ms("commit_ms", part["commit"]),
        **_ms("update_ms", part["update"]),
        **_ms("step_ms", part["step"]),
        **_ms("forward_ms", part["forward"]),
        "network_ms": network,
        **_ms("verdict_ms", part["verdict"]),
        "step_over_forwards": median["step"] / forwards,
        "draft_share": median["draft"] / median["step"],
        "loop_efficiency": efficiency,
    }


def _ms(key: str, timing: Timing) -> dict[str, float]:
    return {key: timing.median, f"{key}_min": timing.minimum}


def describe(results: dict[str, Any]) -> str:
    """The results as text for a terminal."""
    lines = [f"shape {results['shape']['name']}, {results['shape']['parameters'] / 1e6:.1f}M parameters"]
    if "bandwidth_gb_per_s" in results:
        kinds = ", ".join(f"{name} {rate:.1f}" for name, rate in results["bandwidth_by_kind_gb_per_s"].items())
        lines.append(f"bandwidth          {results['bandwidth_gb_per_s']:.1f} GB/s ({kinds})")
    if "plain" in results:
        plain = results["plain"]
        share = plain["bandwidth_share"]
        lines.append(f"plain decoding     {plain['ms_per_token']:.2f} ms/token, {share:.0%} of the bandwidth")
    if results.get("huggingface"):
        text = f"transformers       {results['huggingface']['ms_per_token']:.2f} ms/token"
        if "plain" in results:
            ratio = results["huggingface"]["ms_per_token"] / results["plain"]["ms_per_token"]
            text += f"; plain decoding here is {ratio:.2f}x as fast"
        lines.append(text)
    elif "huggingface" in results:
        lines.append("transformers       not installed")
    if "rows" in results:
        lines.append("forward, ms        " + "  ".join(f"{row['rows']}: {row['ms']:.2f}" for row in results["rows"]))
    for name, entry in results.get("drafters", {}).items():
        pieces = " + ".join(f"{part} {entry[f'{part}_ms']:.2f}" for part in ("draft", "verify", "commit", "update"))
        lines.append(f"{name:<18} step {entry['step_ms']:.2f} ms ({pieces} alone), {entry['tree_nodes']} rows")
        lines.append(
            f"{'':<18} {entry['step_over_forwards']:.2f}x its forwards (target {entry['forward_ms']:.2f} + network "
            f"{entry['network_ms']:.2f} ms), loop efficiency {entry['loop_efficiency']:.0%}"
        )
    return "\n".join(lines)


def _check_out(out: Path) -> None:
    """Refuses before the measurements what could not be written after them."""
    if out.is_dir():
        raise UserError(f"cannot write {out}: it is a directory, expected a JSON file")
    nearest = next(folder for folder in out.absolute().parents if folder.exists())
    if not nearest.is_dir():
        raise UserError(f"cannot write {out}: {nearest} is not a directory")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"cannot write {out}: {nearest} is not writable")


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """The command; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m eval.speed", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="110m", help=f"one of {', '.join(SHAPES)} (110m)")
    parser.add_argument("--sections", default=",".join(SECTIONS), help="comma-separated; all by default")
    parser.add_argument("--rounds", type=int, default=9, help="samples of each timing (9)")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args(argv)
    sections = [name.strip() for name in args.sections.split(",") if name.strip()]
    if args.out is not None:
        _check_out(args.out)
    with Progress() as progress:
        results = run(args.shape, sections, args.rounds, progress=progress)
    print(describe(results))
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(results, args.out)
        print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
