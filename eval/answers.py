"""How well and how fast targets answer: decoders and encoder-decoders side by side, on pairs of prompts and answers.

    python -m eval.answers --data data/chat --targets decoder=runs/lm/target ours=runs/encoder_decoder/target --out DIR

Prompts and answers are those of a chat data set (`train/data/pairs.py`), as they are learnt. Of each target: `loss`,
nats per token of the answers, end token included, given prompt and answer so far; what it answers greedily, compared
with the data set's answer word by word (`rouge_l`, F1 by the longest common subsequence, and `exact`); and, one prompt
at a time, `first_token_ms`, from the prompt to the first token chosen, and `tokens_per_second` behind it. Times are
medians over repeats in which targets take turns; what is compiled is compiled before.
"""

import argparse
import functools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from decoding.generate import Generation, bucket, generate, slots_needed
from eval.measure.environment import describe_environment
from eval.measure.progress import Progress
from eval.report.files import make_directory, write_json
from eval.report.page import RESULTS, print_columns
from eval.text.results import describe_target
from models import command_line, processes
from models.command_line import add_distributed, add_overwrite, at_least, keep_files
from models.encoder_decoder import beside, encode
from models.errors import UserError, exit_on_user_error
from models.formats.target import Target, load_target
from models.layout import Layout
from models.transformer import forward
from train.data.order import in_order
from train.objectives.encoder_decoder import joined
from train.objectives.shift import labels_at, log_likelihood

_NOT_RECORDED = ("out", "overwrite", "distributed")


def words_in_common(ours: str, theirs: str) -> float:
    """ROUGE-L: F1 of the longest common subsequence of words, whatever their case."""
    mine, other = ours.lower().split(), theirs.lower().split()
    if not mine or not other:
        return float(mine == other)
    longest = [0] * (len(other) + 1)
    for word in mine:
        before = 0
        for place, against in enumerate(other, 1):
            kept = longest[place]
            longest[place] = before + 1 if word == against else max(kept, longest[place - 1])
            before = kept
    return 2 * longest[-1] / (len(mine) + len(other))


@functools.partial(jax.jit, static_argnames=("config",))
def answer_loss(config, params, batch: dict[str, Array]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(sum, number) of -log p over the tokens of answers, by a decoder or an encoder-decoder."""
    labels, counted = labels_at(batch, 1)
    if config.encoder_layers:
        memory = encode(config, params, batch["source"], batch["source_length"])
        text = batch["tokens"].at[:, 0].set(config.bos_id)
        layout = Layout.causal(text.shape[0], text.shape[1], batch["segments"])
        logits = forward(config, params, text, *beside(memory, layout)).logits
    else:
        tokens, segments, first = joined(batch)
        layout = Layout.causal(tokens.shape[0], tokens.shape[1], segments)
        logits = forward(config, params, tokens, layout).logits[:, first:]
    return -jnp.sum(log_likelihood(logits, labels) * counted), jnp.sum(counted)


def answer(target: Target, prompt: list[int], new_tokens: int) -> Generation:
    """Greedily, in a cache that fits the longest prompt of its kind."""
    own = bucket(len(target.opening(prompt)), 16)
    return generate(target, [prompt], max_new_tokens=new_tokens, capacity=bucket(slots_needed(own, new_tokens, 0)))


def study(
    targets: dict[str, Target], rows: Any, *, count: int, new_tokens: int, repeats: int, progress: Callable[[str], None]
) -> list[dict[str, Any]]:
    """One entry of `runs` per target.

    Args:
      targets: by what people call them, all of one tokenizer.
      rows: `train.data.pairs.PairRows`.
      count: prompts that are answered; all are scored.
      new_tokens: most tokens of an answer.
      repeats: how often each prompt is answered and timed.
      progress: told what is done.
    """
    picked = [rows[index] for index in range(min(count, len(rows)))]
    prompts = [row["source"][: row["source_length"]].tolist() for row in picked]
    truth = [row["tokens"][row["mask"] > 0].tolist() for row in picked]
    made: dict[str, list[Generation]] = {}
    for label, target in targets.items():
        progress(f"compiling for {label}")
        made[label] = [answer(target, prompt, new_tokens) for prompt in prompts]
    first: dict[str, list[list[float]]] = {label: [] for label in targets}
    rates: dict[str, list[float]] = {label: [] for label in targets}
    for repeat in range(repeats):
        progress(f"repeat {repeat + 1} of {repeats}")
        taken = {label: [answer(target, prompt, new_tokens) for prompt in prompts] for label, target in targets.items()}
        for label, answers in taken.items():
            first[label].append([one.prefill_seconds for one in answers])
            committed = sum(one.stats[0].committed for one in answers)
            # Without a step, where every answer is its first token, there is no rate.
            seconds = sum(one.decode_seconds for one in answers)
            rates[label].append(committed / seconds if committed else 0.0)
    runs = []
    for label, target in targets.items():
        progress(f"scoring with {label}")
        batches = ({k: jnp.asarray(v) for k, v in batch.items()} for batch in in_order(rows, 8))
        sums = np.sum([answer_loss(target.config, target.params, batch) for batch in batches], axis=0)
        assert target.tokenizer is not None
        said = [target.tokenizer.decode(one.tokens[0]).strip() for one in made[label]]
        meant = [target.tokenizer.decode(tokens).strip() for tokens in truth]
        pairs = list(zip(said, meant, strict=True))
        runs.append(
            {
                "label": label,
                "target": describe_target(target, encoder_layers=target.config.encoder_layers),
                "loss": float(sums[0] / sums[1]),
                "rouge_l": statistics.fmean(words_in_common(ours, theirs) for ours, theirs in pairs),
                "exact": statistics.fmean(ours == theirs for ours, theirs in pairs),
                "first_token_ms": 1e3 * statistics.median(np.median(first[label], axis=0)),
                "tokens_per_second": statistics.median(rates[label]),
                "answers": [{"said": ours, "meant": theirs} for ours, theirs in pairs[:8]],
            }
        )
    return runs


def _targets(specs: Sequence[str]) -> dict[str, Target]:
    found: dict[str, Target] = {}
    for spec in specs:
        label, split, directory = spec.partition("=")
        if not split or not label or label in found:
            raise UserError(f"--targets {spec!r} must be LABEL=DIR, each label once")
        found[label] = load_target(directory)
        if found[label].tokenizer is None:
            raise UserError(f"{directory} has no tokenizer, so that its answers could not be read")
    return found


def _parser() -> argparse.ArgumentParser:
    parser = command_line.parser("eval.answers", __doc__)
    parser.add_argument("--targets", required=True, nargs="+", metavar="LABEL=DIR", help="target directories")
    parser.add_argument("--data", required=True, help="chat data set of their tokenizer")
    parser.add_argument("--split", default="valid", help="its split")
    parser.add_argument("--source_length", type=at_least(1), default=256, help="tokens of the longest prompt")
    parser.add_argument("--new_tokens", type=at_least(1), default=63, help="most tokens of an answer")
    parser.add_argument("--prompts", type=at_least(1), default=64, help="that are answered; all are scored")
    parser.add_argument("--repeats", type=at_least(1), default=3, help="timed answers to each")
    parser.add_argument("--out", required=True, help="directory for results.json")
    add_overwrite(parser)
    add_distributed(parser)
    return parser


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """The command; see the module's docstring."""
    from train.data.pairs import PairRows
    from train.data.texts import open_split

    args = _parser().parse_args(argv)
    processes.start(args.distributed)
    directory = make_directory(args.out)
    keep_files([directory / RESULTS], args.overwrite)
    targets = _targets(args.targets)
    prints = {target.tokenizer.fingerprint for target in targets.values() if target.tokenizer}
    if len(prints) > 1:
        raise UserError("the targets have different tokenizers, so that losses per token could not be compared")
    documents = open_split(args.data, args.split, tokenizer_fingerprint=prints.pop())
    rows = PairRows(documents, args.source_length, args.new_tokens + 1)
    with Progress() as progress:
        runs = study(
            targets, rows, count=args.prompts, new_tokens=args.new_tokens, repeats=args.repeats, progress=progress
        )
    environment = describe_environment()
    config = {name: value for name, value in vars(args).items() if name not in _NOT_RECORDED}
    results = {"environment": environment, "command": environment["command"], "config": config, "runs": runs}
    write_json(results, directory / RESULTS)
    table = [["target", "parameters", "loss", "ROUGE-L", "exact", "first token", "tokens/s"]]
    for run in runs:
        quality = [f"{run['loss']:.3f}", f"{run['rouge_l']:.3f}", f"{run['exact']:.2f}"]
        speed = [f"{run['first_token_ms']:.1f} ms", f"{run['tokens_per_second']:.0f}"]
        table.append([run["label"], f"{run['target']['parameters']:,}", *quality, *speed])
    print_columns(table, ruled=True)
    print(f"\nwrote {directory / RESULTS}")


if __name__ == "__main__":
    main()
