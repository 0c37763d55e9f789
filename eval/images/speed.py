"""How near the machine's limit images are made: published shapes, random weights, everything in one interleaved run.

The section `images` of `python -m eval.speed` (`--image_depths 30,16 --image_batch 64` for the shapes and the batch of
CoDe's table):

    batch, depths      images made together; of the deep and of the shallow transformer
    dtype              of the transformers' and the decoder's parameters; the quantiser always has float32
    peak_gflop_per_s   matrix product of 2048 x 2048 in that dtype
    models             name -> {seconds, images_per_s, gflop, peak_share, compile_seconds, temporary_megabytes}: VAR by
                       a deep and by a shallow transformer, `code-N` by the deep one for N scales and the shallow one
                       for the rest; transformer, guidance, draws and quantiser, without the decoder
    code               N -> {speedup, flop_ratio, speedup_over_flop_ratio}, over VAR by the deep one
    decoder            {seconds_per_image, end_to_end: name -> images_per_s}; end to end is timed as a whole
    torch              the same in PyTorch, where it is installed and computes on the same kind of device: name ->
                       {seconds, speedup of ours}, without end to end; else null

Everybody draws by VAR's settings; what is drawn decides nothing about time. Seconds are medians over rounds, per batch;
`..._min` beside them are minima.
On a GPU, XLA_PYTHON_CLIENT_PREALLOCATE=false leaves PyTorch its part of the memory.
"""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt8

from decoding.images.generate import Stage, Tokenizer, code_stages, decode_pixels
from decoding.images.scales import Drawing, Sketch
from eval.images.programs import compile_stages
from eval.measure.timing import Part, Timed, Timing, measure
from eval.measure.weights import random_weights
from eval.peers import images as peer
from models.errors import UserError
from models.images import var, vqvae
from models.images.config import VARConfig, VQVAEConfig, scale_starts
from models.transformer import Params

PEAK_SIDE = 2048
PEAK_PRODUCTS = 16
DRAFT_SCALES = (8, 6)
WHOLE = "end to end"  # What the parts are called that go from classes to pixels.


def var_shape(depth: int, tokenizer: VQVAEConfig) -> VARConfig:
    """The published family: width 64 d, d heads, 1000 classes."""
    return VARConfig(
        depth, 64 * depth, depth, 1000, tokenizer.vocab_size, tokenizer.latent_channels, scales=tokenizer.scales
    )


def flop(config: VARConfig, first: int, last: int, guided: bool = True) -> int:
    """Floating-point operations of matrix products for one image's scales `first` to `last - 1`.

    A prefix, scales before `first`, goes through the blocks and not through the head (CoDe, Chen et al. 2024).

    Args:
      config: shape of the model.
      first: first scale that it makes.
      last: one past the last.
      guided: with and without the class.
    """
    C, starts = config.width, scale_starts(config.scales)
    begins = [0, *starts[first + 1 : last]]
    ends = starts[first + 1 : last + 1]
    # Every row of a pass multiplies the keys of all rows so far, its own pass included.
    pairs = sum((end - begin) * end for begin, end in zip(begins, ends, strict=True))
    tokens, drawn = starts[last], starts[last] - starts[first]
    kernels = (4 + 2 * config.mlp_ratio) * C * C
    per_branch = 2 * config.depth * (tokens * kernels + 2 * pairs * C) + 2 * drawn * C * config.vocab_size
    return (2 if guided else 1) * per_branch


class Made:
    """Stages on a batch, ready to be timed, compiled ahead so that time and memory of that can be told.

    Attributes:
      compile_seconds: of all programs.
      temporary_bytes: of the largest.
    """

    def __init__(self, tokenizer: VQVAEConfig, codes: Any, stages: list[Stage], batch: int):
        """`codes`: the quantiser's parameters."""
        self._programs = compile_stages(tokenizer, codes, stages, batch)
        self.compile_seconds = sum(program.seconds for program in self._programs)
        memories = [program.compiled.memory_analysis() for program in self._programs]
        self.temporary_bytes = max(memory.temp_size_in_bytes for memory in memories)
        labels = jnp.arange(batch, dtype=jnp.int32) % stages[0].config.num_classes
        self._given = [(codes, stage.params, labels) for stage in stages]
        self._empty = Sketch.empty(tokenizer, batch)

    def run(self) -> Sketch:
        """Makes the batch and returns its sketch, which may not be computed yet."""
        sketch = self._empty
        for program, given in zip(self._programs, self._given, strict=True):
            sketch = program.make(*given, sketch)
        return sketch

    def sample(self) -> float:
        """Seconds per batch."""
        started = time.perf_counter()
        jax.block_until_ready(self.run())
        return time.perf_counter() - started


class Whole:
    """Stages and then the decoder, from classes to pixels as `generate_images` goes, ready to be timed."""

    def __init__(self, tokenizer: Tokenizer, made: Made):
        """`made`: the stages."""
        self._tokenizer, self._made = tokenizer, made

    def pixels(self) -> UInt8[np.ndarray, "B H W 3"]:
        """The batch."""
        return decode_pixels(self._tokenizer, np.asarray(self._made.run().f_hat))

    def sample(self) -> float:
        """Seconds per batch."""
        started = time.perf_counter()
        self.pixels()
        return time.perf_counter() - started


class Decoded:
    """A VQ-VAE's decoder on a batch, ready to be timed."""

    def __init__(self, tokenizer: Tokenizer, batch: int):
        """`batch` images per sample."""
        side, channels = tokenizer.config.scales[-1], tokenizer.config.latent_channels
        f_hat = np.random.default_rng(0).standard_normal((batch, side, side, channels)).astype(np.float32)
        self._arguments = (tokenizer, f_hat)

    def sample(self) -> float:
        """Seconds per batch."""
        started = time.perf_counter()
        decode_pixels(*self._arguments)
        return time.perf_counter() - started


def run_images(
    rounds: int,
    *,
    depths: tuple[int, int] = (16, 8),
    tokenizer: VQVAEConfig = VQVAEConfig(),
    draft_scales: tuple[int, ...] = DRAFT_SCALES,
    batch: int = 2,
    dtype: Any = jnp.float32,
    with_torch: bool = True,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measures; see the module's docstring for what comes back.

    Args:
      rounds: samples of each timing.
      depths: of the deep and of the shallow transformer.
      tokenizer: shape of the VQ-VAE.
      draft_scales: of collaborative decoding.
      batch: images, each with and without its class.
      dtype: of the transformers' and the decoder's parameters.
      with_torch: time PyTorch too, where it is installed for the same kind of device.
      progress: told what is being done.

    Raises:
      UserError: rounds, depths or batch are below 1, or the first depth is not the larger one.
    """
    for name, value in (("rounds", rounds), ("the batch of images", batch)):
        if value < 1:
            raise UserError(f"{name} must be at least 1, got {value}")
    if not depths[0] > depths[1] >= 1:
        raise UserError(f"image depths must be two numbers of 1 or more, the larger first, got {depths}")
    progress("making the models")
    vae = _vae(tokenizer, dtype)
    models = {
        depth: (config, _random(functools.partial(var.init, config, dtype=dtype), depth))
        for depth in depths
        for config in [var_shape(depth, tokenizer)]
    }
    stages = _stages(models, draft_scales)
    parts: dict[str, Timed] = {"peak": peak_part(dtype)}
    made = {}
    for name, turn in stages.items():
        progress(f"compiling {name}")
        made[name] = Made(tokenizer, _codes(vae), turn, batch)
        parts |= {name: made[name], f"{name} {WHOLE}": Whole(vae, made[name])}
    parts["decoder"] = Decoded(vae, batch)
    if with_torch:
        parts |= _torch_parts(vae, stages, batch, dtype)
    timings = measure(parts, rounds, progress)
    head = {"batch": batch, "depths": list(depths), "dtype": jnp.dtype(dtype).name}
    return {**head, **_summarise(stages, made, timings, batch)}


def peak_part(dtype: Any) -> Part:
    """The matrix products whose rate others are measured by."""
    side = _peak_side()
    # Numbers as models have them: a product of equal ones takes less power, and is faster for that.
    square = jax.random.normal(jax.random.key(0), (side, side), dtype) / side**0.5
    # Several in turn, so that a sample is not much shorter than those of the models, and feels the machine as they do.
    return Part.of(
        lambda fixed, varying: jax.lax.fori_loop(0, PEAK_PRODUCTS, lambda _, x: x @ fixed, varying), square, square
    )


def peak_flop() -> int:
    """Of all these products."""
    return PEAK_PRODUCTS * 2 * _peak_side() ** 3


def _peak_side() -> int:
    # An H200 does 555 TFLOP/s at a side of 2048 and 743 at 8192, above which it is slower again.
    return PEAK_SIDE if jax.default_backend() == "cpu" else 4 * PEAK_SIDE


def _vae(config: VQVAEConfig, dtype: Any) -> Tokenizer:
    """The decoder in `dtype`; the quantiser, which never runs below float32, is not narrowed."""
    params = _random(lambda key: vqvae.init(config, key), 0)
    narrow = {name: jax.tree.map(lambda leaf: leaf.astype(dtype), params[name]) for name in ("decoder", "post_quant")}
    return Tokenizer(config, {**params, **narrow})


def _random(init: Callable[[Array], Params], seed: int) -> Params:
    """Numbers in the place of those that `init` would draw."""
    return random_weights(jax.eval_shape(init, jax.random.key(seed)), jax.random.key(seed))


def _codes(tokenizer: Tokenizer) -> Params:
    return {name: tokenizer.params[name] for name in ("codebook", "phi")}


def _stages(models: dict[int, tuple[VARConfig, Params]], draft_scales: Sequence[int]) -> dict[str, list[Stage]]:
    """Everybody by name: VAR by each depth, and the two together."""
    drawing = Drawing()
    alone = {f"var-d{depth}": [Stage(*model, model[0].num_scales, drawing)] for depth, model in models.items()}
    deep, shallow = models.values()
    return alone | {f"code-{n}": code_stages(deep, shallow, n, drawing, drawing) for n in draft_scales}


def _torch_parts(tokenizer: Tokenizer, stages: dict[str, list[Stage]], batch: int, dtype: Any) -> dict[str, Timed]:
    """The same in PyTorch by the same names, nothing where it is missing or lacks our kind of device."""
    where = peer.device()
    if where is None:
        return {}
    config, codes = tokenizer.config, _codes(tokenizer)
    copies = {
        stage.config: peer.TorchVAR(config, codes, stage.config, stage.params, where)
        for turn in stages.values()
        if len(turn) == 1
        for stage in turn
    }
    parts: dict[str, Timed] = {
        f"torch {name}": peer.TorchImages([(copies[stage.config], stage.last) for stage in turn], Drawing(), batch)
        for name, turn in stages.items()
    }
    return parts | {"torch decoder": peer.TorchDecoder(config, batch, where, jnp.dtype(dtype).name)}


def _summarise(
    stages: dict[str, list[Stage]], made: dict[str, Made], timings: dict[str, Timing], batch: int
) -> dict[str, Any]:
    seconds = {name: timing.median / 1e3 for name, timing in timings.items()}
    peak = peak_flop() / seconds["peak"] / 1e9
    models: dict[str, Any] = {}
    for name, turn in stages.items():
        firsts = [0, *(stage.last for stage in turn)]
        work = batch * sum(flop(stage.config, first, stage.last) for stage, first in zip(turn, firsts, strict=False))
        models[name] = {
            "seconds": seconds[name],
            "seconds_min": timings[name].minimum / 1e3,
            "images_per_s": batch / seconds[name],
            "gflop": work / 1e9,
            "peak_share": work / seconds[name] / 1e9 / peak,
            "compile_seconds": made[name].compile_seconds,
            "temporary_megabytes": made[name].temporary_bytes / 1e6,
        }
    deep = models[next(iter(models))]
    code = {}
    for name, entry in models.items():
        if name.startswith("code-"):
            speedup, ratio = deep["seconds"] / entry["seconds"], deep["gflop"] / entry["gflop"]
            code[name.removeprefix("code-")] = {
                "speedup": speedup,
                "flop_ratio": ratio,
                "speedup_over_flop_ratio": speedup / ratio,
            }
    torch = {
        name: {"seconds": seconds[f"torch {name}"], "speedup": seconds[f"torch {name}"] / seconds[name]}
        for name in (*models, "decoder")
        if f"torch {name}" in seconds
    }
    return {
        "peak_gflop_per_s": peak,
        "models": models,
        "code": code,
        "decoder": {
            "seconds_per_image": seconds["decoder"] / batch,
            "end_to_end": {name: batch / seconds[f"{name} {WHOLE}"] for name in models},
        },
        "torch": torch or None,
    }


def describe(results: dict[str, Any]) -> list[str]:
    """The results as lines for a terminal."""
    batches = f"images in batches of {results['batch']}"
    lines = [f"matrix products    {results['peak_gflop_per_s']:.0f} GFLOP/s in {results['dtype']}; {batches}"]
    for name, entry in results["models"].items():
        whole = results["decoder"]["end_to_end"][name]
        lines.append(
            f"{name:<18} {entry['images_per_s']:.2f} images/s ({whole:.2f} with the decoder), "
            f"{entry['peak_share']:.0%} of that rate, compiled in {entry['compile_seconds']:.0f} s"
        )
    for number, entry in results["code"].items():
        lines.append(
            f"CoDe, N = {number:<8} {entry['speedup']:.2f}x, operations fall {entry['flop_ratio']:.2f}x: "
            f"{entry['speedup_over_flop_ratio']:.0%} of that"
        )
    lines.append(f"decoder            {results['decoder']['seconds_per_image']:.2f} s an image")
    if results["torch"] is None:
        lines.append("torch              not installed, or not for this kind of device")
    for name, entry in (results["torch"] or {}).items():
        lines.append(f"{'torch ' + name:<18} {entry['seconds']:.2f} s: ours is {entry['speedup']:.2f}x as fast")
    return lines
