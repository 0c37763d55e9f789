"""Continues a prompt and streams the text as it is committed.

    python -m scripts.generate --target DIR [--drafter DIR] --prompt TEXT [--temperature 0.8] [--max_new_tokens 128]
    python -m scripts.generate --target DIR --drafter none,token_recycling,DIR --prompt TEXT
    python -m scripts.generate --target DIR --augment DIR [--augment_every N] [--augment_lag N] --prompt TEXT

The last line tells how it went: tokens, target forwards, acceptance length, tokens per second. On a terminal, text that
a drafter wrote is coloured, the deeper its draft the brighter. Several drafters write the text one after the other, and
each is compared with the first. With `--augment` a coprocessor's latents lie in the cache beside the text.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

from decoding.augment import Augment, first_pause, refuse_times_without
from decoding.drafter import Drafter
from decoding.drafters.registry import load_drafter, split_names
from decoding.generate import Generation, bucket, catching_up, check_context, generate, slots_needed
from decoding.sampling import Sampling
from decoding.verify import Typical
from models import command_line, processes
from models.command_line import add_distributed, add_mesh, at_least
from models.errors import UserError, exit_on_user_error
from models.formats.continuation import Continuation, split_stops
from models.formats.target import Target, load_target
from models.formats.text_files import half_character, read_text, shown
from models.sharding import parse_mesh

# Of the 256 colours of terminals: greens, from an accepted draft of depth 1 to the deepest.
DEPTH_COLOURS = (71, 77, 83, 119, 155, 191)
RESET = "\x1b[0m"
_STOP = "end the text with this, wherever it lies among tokens, or with this special token; repeatable"


class TextStream:
    """Writes tokens as text while they are committed."""

    def __init__(self, text: Continuation, out: TextIO, color: bool, opening: str = ""):
        """Writes to `out`, coloured by who wrote the token if `color`; `opening` comes first, with the first token."""
        self._text, self._out, self._color = text, out, color
        self._opening = opening

    def __call__(self, row: int, tokens: Sequence[int], writers: Sequence[int]) -> None:
        """Writes what `tokens` complete; the arguments are those of `generate`'s `on_tokens`."""
        self._write(self._opening, 0)
        self._opening = ""
        for token, writer in zip(tokens, writers, strict=True):
            self._write(self._text.feed(token), writer)
        self._out.flush()

    def finish(self) -> None:
        """Writes what was held back, and a line end."""
        self._write(self._text.flush(), 0)
        self._out.write("\n")
        self._out.flush()

    def _write(self, text: str, writer: int) -> None:
        if text and writer and self._color:
            colour = DEPTH_COLOURS[min(writer, len(DEPTH_COLOURS)) - 1]
            # Line by line: some pagers forget a colour at a line's end.
            text = "\n".join(f"\x1b[38;5;{colour}m{line}{RESET}" if line else "" for line in text.split("\n"))
        self._out.write(text)


def rate(made: Generation) -> float:
    """Tokens per second of the loop's steps; 0 where the prompt's reading chose all of the text."""
    return made.stats[0].committed / made.decode_seconds if made.stats[0].steps else 0.0


def statistics_line(made: Generation) -> str:
    """What the last line says: counts of the loop, tokens per second of its steps, and prefill."""
    latents = ""
    if calls := sum(made.augmentations):
        latents = f", latents {calls} times {1e3 * made.augment_seconds / calls:.1f} ms"
    return f"{made.stats[0].line()}, {rate(made):.1f} tokens/s, prefill {1e3 * made.prefill_seconds:.1f} ms{latents}"


def comparison(made: Generation, first: Generation, name: str) -> str:
    """How fast a text came beside the first drafter's, and whether it is the same."""
    faster = f"{rate(made) / rate(first):.2f}x as fast as {name}, " if rate(first) else ""
    return f": {faster}{'the same' if made.tokens == first.tokens else 'another'} text"


def stream(
    target: Target,
    tokens: Sequence[int],
    on_tokens: Callable[[int, list[int], list[int]], None],
    *,
    drafter: tuple[Drafter, Any],
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
    stop: Sequence[str],
    typical: bool,
    augment: Augment | None = None,
) -> Generation:
    """Decodes once for compilation, briefly, and then for the reader.

    Args:
      target: the model; it has a tokenizer.
      tokens: the prompt.
      on_tokens: receives tokens as they are committed.
      drafter: the drafter and its parameters.
      max_new_tokens: most tokens to write.
      sampling: how tokens are chosen.
      seed: of the draws.
      stop: texts that end the output, beside the target's end tokens.
      typical: lossy typical acceptance.
      augment: whose latents go into the cache.

    Raises:
      UserError: a request that does not fit the context.
    """
    opening = target.opening(tokens)
    before = len(opening)
    room = target.config.max_position - before
    if augment is None and max_new_tokens > room:
        raise UserError(
            f"--max_new_tokens must be at most {max(room, 0)}, which a prompt of {before} tokens leaves of the "
            f"target's context of {target.config.max_position}, got {max_new_tokens}"
        )
    check_context(target.config, [opening], [max_new_tokens], augment)
    proposer, params = drafter
    options = {
        "drafter": proposer,
        "drafter_params": params,
        "sampling": sampling,
        "seeds": seed,
        "stop_texts": stop,
        "typical": Typical() if typical else None,
        "capacity": bucket(slots_needed(before, max_new_tokens, proposer.max_depth, augment) + catching_up(proposer)),
        "augment": augment,
    }
    # The stream would wait in its middle for the compiler, and the rate would tell how long that took.
    generate(target, [tokens], max_new_tokens=min(2 + first_pause(augment), max_new_tokens), **options)
    return generate(target, [tokens], max_new_tokens=max_new_tokens, on_tokens=on_tokens, **options)


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """The command; see the module's docstring."""
    args = _parser().parse_args(argv)
    sampling = _sampling(args)
    text = args.prompt if args.prompt is not None else read_text(args.prompt_file)
    if half_character(text) is not None:
        raise UserError(f"--prompt is no UTF-8 text: {shown(text)[:60]}")
    if not text:
        raise UserError("the prompt is empty: a text needs at least one token to begin with")
    if wrong := [text for text in args.stop if half_character(text) is not None]:
        raise UserError(f"--stop is no UTF-8 text: {shown(wrong[0])[:60]}")
    if not 0 <= args.seed < 2**32:
        raise UserError(f"--seed must be in [0, 2^32), got {args.seed}")
    refuse_times_without(bool(args.augment), args.augment_every, args.augment_lag, "--augment")
    processes.start(args.distributed)
    target = load_target(args.target, mesh=parse_mesh(args.mesh) if args.mesh else None)
    tokenizer = target.tokenizer
    if tokenizer is None:
        raise UserError(f"{args.target} has no tokenizer: expected the file tokenizer.json of a Hugging Face directory")
    tokens = tokenizer.encode_chat([{"role": "user", "content": text}]) if args.chat else tokenizer.encode(text)
    color = sys.stdout.isatty() if args.color is None else args.color
    names = split_names(args.drafter)
    if not names:
        raise UserError("--drafter must name at least one, such as none")
    drafters = [load_drafter(name, target) for name in names]
    augment = Augment.load(args.augment, target, args.augment_every, args.augment_lag) if args.augment else None
    first: Generation | None = None
    for name, drafter in zip(names, drafters, strict=True):
        if len(names) > 1:
            print(("\n" if first else "") + f"{name}:", flush=True)
        behind = Continuation(tokenizer, target.opening(tokens), split_stops(tokenizer, args.stop)[1])
        apart = args.chat or target.config.encoder_layers
        writer = TextStream(behind, sys.stdout, color, opening="" if apart else text)
        made = stream(
            target,
            tokens,
            writer,
            drafter=drafter,
            max_new_tokens=args.max_new_tokens,
            sampling=sampling,
            seed=args.seed,
            stop=args.stop,
            typical=args.typical,
            augment=augment,
        )
        writer.finish()
        compared = comparison(made, first, names[0]) if first else ""
        print(statistics_line(made) + (", lossy (typical acceptance)" if args.typical else "") + compared)
        first = first or made


def _sampling(args: argparse.Namespace) -> Sampling:
    try:
        return Sampling(args.temperature, args.top_k, args.top_p, args.min_p)
    except UserError as error:  # It begins with the setting, which is what the option is called.
        raise UserError(f"--{error}") from None


def _parser() -> argparse.ArgumentParser:
    parser = command_line.parser("scripts.generate", __doc__)
    parser.add_argument("--target", required=True, help="target directory")
    parser.add_argument("--drafter", default="none", help="drafter directory or bare name, or several with commas")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", help="text to continue")
    prompt.add_argument("--prompt_file", type=Path, help="file whose whole content is the prompt")
    parser.add_argument("--chat", action="store_true", help="put the prompt in the tokenizer's chat template")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token")
    parser.add_argument("--top_k", type=int, default=0, help="sample among this many tokens; 0 means all")
    parser.add_argument(
        "--top_p", type=float, default=1.0, help="sample among the likeliest tokens of this probability"
    )
    parser.add_argument("--min_p", type=float, default=0.0, help="drop tokens below this share of the likeliest one's")
    parser.add_argument("--max_new_tokens", type=at_least(1), default=128, help="most tokens to write")
    parser.add_argument("--seed", type=int, default=0, help="of the draws when the temperature is above 0")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help=_STOP)
    parser.add_argument("--typical", action="store_true", help="lossy typical acceptance of drafts")
    parser.add_argument("--augment", metavar="DIR", help="coprocessor directory, whose latents go into the cache")
    parser.add_argument("--augment_every", type=at_least(1), help="again after so many tokens (default: once)")
    parser.add_argument("--augment_lag", type=at_least(0), default=0, help="latents come so many tokens late")
    add_mesh(parser)
    add_distributed(parser)
    parser.add_argument("--color", action=argparse.BooleanOptionalAction, help="colour drafts (default: on a terminal)")
    return parser


if __name__ == "__main__":
    main()
