"""Writes our directories from other formats: targets from checkpoints, drafters and image models from releases.

    python -m scripts.convert --from llama2c --src stories260K.bin --tokenizer tok512.bin --out stories260K
    python -m scripts.convert --from gguf --src SmolLM2-135M-Instruct.Q4_1.gguf --out smollm2
    python -m scripts.convert --from mu --src model.pt --tokenizer Phi-3.5-mini-instruct --out mu
    python -m scripts.convert --from eagle3 --src EAGLE3-LLaMA3-8B --base Meta-Llama-3-8B-Instruct --out eagle3
    python -m scripts.convert --from model --src small/target --base large/target --policy static:tree=chain:4 --out d
    python -m scripts.convert --from model --src nested/target --base large/target --exits 2,4 --thresholds 0.8 --out d
    python -m scripts.convert --from drafter --src d --base fine-tuned/target --out d2
    python -m scripts.convert --from vae --src vae_ch160v4096z32.pth --out vae
    python -m scripts.convert --from var --src var_d36.pth --schedule 512 --out var-d36

A GGUF file may be of the architectures llama (Mistral's too), qwen2, qwen3 and gemma2 and hold any mixture of F32, F16,
BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K and Q6_K; quantised weights become float32.

`mu` is an encoder-decoder as "Return of the Encoder" releases it, one file of torch's; its tokenizer is a directory.

A target directory loads with `models.load_target`, and all but encoder-decoders with transformers too. A drafter
directory is for `--base`, the target directory that the drafter was trained on. What a drafter or an encoder-decoder
was made from is kept in its directory under `provenance`. Drafters come as one file or a directory, in safetensors or
in torch's format, which is read without torch and without running anything in it. `model` makes a drafter of a whole
target directory, a smaller model of the same vocabulary; with `--exits` one that ends after so many layers, after the
first where it is sure by `--thresholds` (`decoding/drafters/nested.py`). `dflash`, `jetspec`, `dspark` and `domino` are
networks that fill a block of tokens at once. `--policy` says how one of these, a model or an EAGLE head grows its trees
(`decoding/policies`).

Image models are VAR's transformers (`var`), its tokenizer (`vae`) and CoDe's drafters and refiners (`code`), one file
each. `--schedule`, `256`, `512` or the sides of the scales, says what their files do not; without it a transformer has
the published schedule of its length, and the tokenizer that for 256 pixels.
"""

import argparse
import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax

from decoding.drafter import Drafter
from decoding.drafters.dflash import DFlash
from decoding.drafters.draft_model import DraftModel
from decoding.drafters.dspark import DSpark
from decoding.drafters.eagle import Eagle, Eagle3
from decoding.drafters.falcon import Falcon
from decoding.drafters.hydra import Hydra
from decoding.drafters.medusa import Medusa
from decoding.drafters.nested import Nested
from decoding.drafters.p_eagle import PEagle
from decoding.drafters.registry import build, save_drafter
from decoding.policies import Expanding, Static, parse_policy
from decoding.trees import MC_SIM_7B_63, Topology, chain
from models import command_line, load_target
from models.command_line import like, numbers
from models.config import TransformerConfig
from models.errors import UserError, exit_on_user_error
from models.formats import image_models as image_files
from models.formats import released_blocks, released_eagle, released_falcon, released_serial
from models.formats import released_heads as released
from models.formats.beside import read_beside
from models.formats.gguf import read_gguf
from models.formats.hf import load_config, load_params, save_target
from models.formats.llama2c import read_llama2c, read_llama2c_tokenizer
from models.formats.release import Release, read_release
from models.formats.released_encoder_decoder import encoder_decoder
from models.formats.released_images import Converted, read_vae, read_var
from models.formats.target import Target, check_vocabulary
from models.formats.text_files import read_json
from models.formats.tokenizer import Tokenizer
from models.formats.tokenizer_files import holds_tokenizer
from models.images.config import SCHEDULES
from models.transformer import Params


class Checkpoint(NamedTuple):
    """A target that was read; `provenance` is kept in its directory."""

    config: TransformerConfig
    params: Params
    tokenizer: Tokenizer
    provenance: dict[str, Any] | None = None


def from_llama2c(source: Path, tokenizer: Path) -> Checkpoint:
    """llama2.c `.bin` files, version 0 or Q8_0 version 2, with their `tokenizer.bin`."""
    config, params = read_llama2c(source)
    return Checkpoint(config, params, read_llama2c_tokenizer(tokenizer, config.vocab_size))


def from_gguf(source: Path, tokenizer: None, dtype: str | None = None) -> Checkpoint:
    """GGUF files, which hold their tokenizer; expanded to `dtype`."""
    config, params, spoken = read_gguf(source, dtype)
    check_vocabulary(config, spoken, source)
    return Checkpoint(config, params, spoken)


def from_mu(source: Path, tokenizer: Path) -> Checkpoint:
    """Encoder-decoders of Return of the Encoder, with the directory of their tokenizer."""
    spoken = Tokenizer.load(tokenizer)
    made = encoder_decoder(source, spoken.eos_ids)
    check_vocabulary(made.config, spoken, source)
    return Checkpoint(made.config, made.params, spoken, made.provenance)


def drawn_chain(heads: released_serial.SerialBlock) -> DSpark:
    """As DSpark and Domino were published: a token drawn in every slot."""
    return DSpark(heads.block, Static(chain(heads.block.depth)), heads.serial)


def published_tree(num_heads: int) -> Topology:
    """The tree that Medusa and Hydra were published with, as far as that many heads reach."""
    return MC_SIM_7B_63.down_to(num_heads)


@dataclasses.dataclass(frozen=True)
class DrafterFormat:
    """One kind of released drafter.

    Attributes:
      files: names that its tensors go by in a directory, first choice first.
      read: makes parameters of them; `--layers` and `--norm_output` are passed on where they are given.
      drafter: the drafter of heads of that shape, with the tree or policy it was published with.
    """

    files: tuple[str, ...]
    read: Callable[..., released.Converted]
    drafter: Callable[[Any], Drafter]


# Format name -> reader of (source, tokenizer file or directory, or None).
TARGETS: dict[str, Callable[..., Checkpoint]] = {"gguf": from_gguf, "llama2c": from_llama2c, "mu": from_mu}
# Formats of targets that bring no tokenizer.
SPEECHLESS = ("llama2c", "mu")

DRAFTERS: dict[str, DrafterFormat] = {
    "medusa": DrafterFormat(
        ("medusa_lm_head.safetensors", "medusa_lm_head.pt"),
        released.medusa,
        lambda heads: Medusa(heads, published_tree(heads.num_heads)),
    ),
    "hydra": DrafterFormat(
        ("hydra_lm_head.safetensors", "hydra_lm_head.pt"),
        released.hydra,
        lambda heads: Hydra(heads, published_tree(heads.num_heads)),
    ),
    "eagle": DrafterFormat((), released_eagle.eagle, Eagle),
    "eagle3": DrafterFormat((), released_eagle.eagle3, Eagle3),
    "eagle31": DrafterFormat((), released_eagle.eagle31, Eagle3),
    "p_eagle": DrafterFormat((), released_eagle.p_eagle, PEagle),
    "dflash": DrafterFormat((), released_blocks.dflash, lambda heads: DFlash(heads, Static(chain(heads.depth), "top"))),
    "jetspec": DrafterFormat((), released_blocks.jetspec, lambda heads: DFlash(heads, _expanding(heads.depth))),
    "dspark": DrafterFormat((), released_serial.dspark, drawn_chain),
    "domino": DrafterFormat((), released_serial.domino, drawn_chain),
    "falcon": DrafterFormat((), released_falcon.falcon, Falcon),
}


def _expanding(depth: int) -> Expanding:
    """JetSpec's tree, or as much of it as so few levels make."""
    made = sum(Expanding.width**level for level in range(1, min(depth, 3) + 1))
    return Expanding(depth, total=min(Expanding.total, 1 + made))


# Formats of drafters that a tree policy grows trees for.
WITH_POLICY = ("model", "eagle", "eagle3", "eagle31", "p_eagle", "dflash", "jetspec", "dspark", "domino", "falcon")

# Format name -> reader of (source, schedule or None).
IMAGES: dict[str, Callable[[Path, Sequence[int] | None], Converted]] = {
    "var": read_var,
    "vae": read_vae,
    "code": read_var,
}


def convert_target(args: argparse.Namespace) -> str:
    """Writes a target directory; returns what was made, for a person."""
    more = {} if args.dtype is None else {"dtype": args.dtype}
    config, params, tokenizer, provenance = TARGETS[args.format](args.src, args.tokenizer, **more)
    save_target(args.out, config, params, tokenizer, overwrite=args.overwrite, provenance=provenance)
    layers = f"{config.encoder_layers} and {config.num_layers}" if config.encoder_layers else f"{config.num_layers}"
    return f"{config.family}, {layers} layers, width {config.width}, vocabulary {config.vocab_size}"


def convert_model(args: argparse.Namespace) -> str:
    """Writes a drafter directory with a whole model in it; returns what was made, for a person."""
    base, config = load_target(args.base), load_config(args.src)
    size = common_vocabulary(args.src, config, base)
    params = load_params(config, args.src, base.params["embed"]["embedding"].dtype)
    if config.vocab_size > size:
        config, params = cut_vocabulary(config, params, size)
    policy = args.policy or Static()
    drafter: Drafter = DraftModel(config, policy)
    if args.exits:
        drafter = Nested(config, policy, tuple(args.exits), tuple(args.thresholds or ()))
    drafter.check(base.config)
    save_drafter(args.out, drafter, params, base.fingerprint(), overwrite=args.overwrite)
    shape = f"{config.num_layers} layers, width {config.width}, vocabulary {size} of {base.config.vocab_size}"
    ends = f", which ends after {facts(args.exits)}," if args.exits else ""
    return f"a draft model of {shape}{ends} for {args.base}"


def common_vocabulary(source: Path, config: TransformerConfig, base: Target) -> int:
    """Tokens that a draft model and its base share: what lies beyond pads the larger of their vocabularies.

    Raises:
      UserError: their tokenizers differ, or vocabularies of two sizes have no tokenizers to be compared by.
    """
    size = min(config.vocab_size, base.config.vocab_size)
    own = Tokenizer.load(source) if holds_tokenizer(source) else None
    if own is None or base.tokenizer is None:
        if config.vocab_size != base.config.vocab_size:
            lacks = source if own is None else base.path
            raise UserError(
                f"the draft model has a vocabulary of {config.vocab_size}, the target one of {base.config.vocab_size}, "
                f"and {lacks} has no tokenizer that could tell whether one is the beginning of the other"
            )
        return size
    if own.fingerprint != base.tokenizer.fingerprint:
        ours, theirs = ({i: piece for piece, i in t.core.get_vocab().items()} for t in (own, base.tokenizer))
        differ = (i for i in sorted(ours.keys() & theirs.keys()) if i < size and ours[i] != theirs[i])
        if (i := next(differ, None)) is not None:
            raise UserError(
                f"{source} has another tokenizer than {base.path}: token {i} is {ours[i]!r} in the one and "
                f"{theirs[i]!r} in the other"
            )
    return size


def move_drafter(args: argparse.Namespace) -> str:
    """Writes a drafter directory as it is, but for another target; returns what was made, for a person."""
    base, record = load_target(args.base), read_json(args.src / "drafter.json")
    drafter = build(record, str(args.src / "drafter.json"))
    drafter.check(base.config)
    was, now = (record.get("base") or {}).get("tokenizer"), base.fingerprint()["tokenizer"]
    if was != now:
        raise UserError(f"{args.src} was made for another tokenizer ({was}) than that of {args.base} ({now})")
    shapes = jax.eval_shape(functools.partial(drafter.init_params, base.config), base.params, jax.random.key(0))
    params = read_beside(args.src, "drafter.json", shapes, None)
    save_drafter(args.out, drafter, params, base.fingerprint(), overwrite=args.overwrite)
    return f"the {drafter.name} of {args.src} for {args.base}"


def cut_vocabulary(config: TransformerConfig, params: Params, size: int) -> tuple[TransformerConfig, Params]:
    """The model with the first `size` tokens of its vocabulary."""
    params = {**params, "embed": {"embedding": params["embed"]["embedding"][:size]}}
    if "head" in params:
        params["head"] = {"kernel": params["head"]["kernel"][:, :size]}
    return dataclasses.replace(config, vocab_size=size), params


def convert_drafter(args: argparse.Namespace) -> str:
    """Writes a drafter directory; returns what was made, for a person."""
    kind = DRAFTERS[args.format]
    release: Release = read_release(args.src, kind.files)
    base: Target = load_target(args.base)
    options = {name: value for name in ("layers", "norm_output") if (value := getattr(args, name)) is not None}
    made = kind.read(release, base, **options)
    files = ", ".join(release.digests)
    drafter = kind.drafter(made.heads)
    if args.policy:
        drafter = dataclasses.replace(cast(Any, drafter), policy=args.policy)
    drafter.check(base.config)
    provenance = {"format": made.format, "files": release.digests, "detected": made.detected}
    save_drafter(args.out, drafter, made.params, base.fingerprint(), overwrite=args.overwrite, provenance=provenance)
    shape = {**dataclasses.asdict(made.heads), **made.detected}
    notes = []
    if "layers" in made.detected:
        which = "given" if args.layers else "original release's; --layers names others"
        notes.append(f"it reads what enters the layers {facts(made.detected['layers'])} of the base (the {which})")
    if not made.compared:
        notes.append(f"{files} repeats no part of its base, so that it was made for {args.base} could not be checked")
    return "\nnote: ".join([f"{made.format} for {args.base}, from {files}; {facts(shape)}", *notes])


def convert_image_model(args: argparse.Namespace) -> str:
    """Writes an image model's directory; returns what was made, for a person."""
    made = IMAGES[args.format](args.src, args.schedule)
    provenance = {"format": args.format, "files": made.digests}
    image_files.save(args.out, made.config, made.params, overwrite=args.overwrite, provenance=provenance)
    told = f"{args.format}; {facts(dataclasses.asdict(made.config))}"
    if made.assumed:
        pixels = next(name for name, scales in SCHEDULES.items() if scales == made.config.scales)
        told += (
            f"\nnote: nothing in {args.src.name} tells its scales; those for images of {pixels} pixels were taken, "
            f"{facts(made.config.scales)}: for others give --schedule {' or '.join(SCHEDULES)}, or a list"
        )
    return told


def facts(value: Any) -> str:
    """What was made, for a person: names and values, without those that are nothing."""
    if isinstance(value, dict):
        held = [(name, item) for name, item in value.items() if item is not None]
        return ", ".join(f"{name} ({facts(x)})" if isinstance(x, dict) else f"{name} {facts(x)}" for name, x in held)
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def schedule(text: str) -> tuple[int, ...]:
    """The value of `--schedule`."""
    if text in SCHEDULES:
        return SCHEDULES[text]
    try:
        sides = tuple(map(int, text.split(",")))
    except ValueError:
        sides = ()
    if len(sides) < 2 or sides[0] < 1 or any(a >= b for a, b in itertools.pairwise(sides)):
        known = ", ".join(SCHEDULES)
        raise argparse.ArgumentTypeError(f"must be {known} or two or more rising sides such as 1,2,3, got {text!r}")
    return sides


def check_options(args: argparse.Namespace) -> None:
    """Raises UserError for an option that the format lacks or has no use for, or an `--out` that is taken."""
    image = args.format in IMAGES
    drafter = not image and args.format not in TARGETS
    if drafter and args.base is None:
        raise UserError(f"--from {args.format} needs --base, the directory of the target that it drafts for")
    for option, value, known in (
        ("--base", args.base, drafter),
        ("--tokenizer", args.tokenizer, args.format in SPEECHLESS),
        ("--dtype", args.dtype, args.format == "gguf"),
        ("--layers", args.layers, args.format in ("eagle3", "eagle31", "p_eagle")),
        ("--norm_output", args.norm_output, args.format == "eagle31"),
        ("--policy", args.policy, args.format in WITH_POLICY),
        ("--exits", args.exits, args.format == "model"),
        ("--thresholds", args.thresholds, args.format == "model" and args.exits is not None),
        ("--schedule", args.schedule, image),
    ):
        if value is not None and not known:
            raise UserError(f"--from {args.format} has no use for {option}")
    if args.format in SPEECHLESS and args.tokenizer is None:
        raise UserError(f"--from {args.format} needs --tokenizer, without which the target could read no text")
    # Said before the work, which takes minutes for large models; what writes the directory holds to it again.
    if args.out.exists() and not args.overwrite:
        raise UserError(f"{args.out} already exists; --overwrite replaces it")


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """The command; see the module's docstring."""
    parser = command_line.parser("scripts.convert", __doc__)
    formats = [*TARGETS, *DRAFTERS, "model", "drafter", *IMAGES]
    parser.add_argument("--from", dest="format", required=True, choices=formats, help="format of the source")
    parser.add_argument("--src", type=Path, required=True, help="checkpoint, or file or directory of released weights")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer file of llama2c, or directory of mu")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of a gguf's numbers (as it has them, quantised ones expanded to float32; bfloat16 takes half and rounds)",
    )
    parser.add_argument("--base", type=Path, help="directory of the target that a released drafter was trained on")
    parser.add_argument(
        "--layers",
        type=like(r"(\d+),(\d+),(\d+)", "three numbers with commas between them", lambda found: tuple(map(int, found))),
        metavar="LOW,MIDDLE,HIGH",
        help="layers whose input eagle3, eagle31 and p_eagle read, if they are not those of the original release",
    )
    parser.add_argument(
        "--norm_output",
        choices=("fed_back", "head"),
        help="where eagle31's switch of this name puts the normed output: head and next step, or head alone",
    )
    parser.add_argument(
        "--policy",
        "--growth",
        metavar="KIND[:NAME=VALUE,...]",
        help="how a model, an EAGLE head or a block grows its trees",
    )
    parser.add_argument("--exits", type=numbers(int), metavar="N[,N,...]", help="layers after which a model may end")
    parser.add_argument(
        "--thresholds",
        type=numbers(float),
        metavar="P[,P,...]",
        help="of each exit but the last, the largest probability from which on its guess is taken",
    )
    parser.add_argument(
        "--schedule",
        type=schedule,
        metavar="|".join([*SCHEDULES, "P,P,..."]),
        help="sides of the maps of codes of an image model: those for images of so many pixels, or a list",
    )
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--overwrite", action="store_true", help="replace a directory of the same kind that exists")
    args = parser.parse_args(argv)
    check_options(args)
    args.policy = parse_policy(args.policy) if args.policy else None
    converters = {"model": convert_model, "drafter": move_drafter, **dict.fromkeys(TARGETS, convert_target)}
    converters |= dict.fromkeys(DRAFTERS, convert_drafter) | dict.fromkeys(IMAGES, convert_image_model)
    made = converters[args.format](args)
    print(f"wrote {args.out}: {made}")


if __name__ == "__main__":
    main()
