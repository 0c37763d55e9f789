"""Writes a target directory (a Hugging Face directory) from a checkpoint in another format.

    python -m scripts.convert --from llama2c --src stories260K.bin --tokenizer tok512.bin --out stories260K

The result loads with `models.load_target` and with transformers.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from models.config import TransformerConfig
from models.errors import UserError, exit_on_user_error
from models.hf import save_target
from models.llama2c import read_llama2c, read_llama2c_tokenizer
from models.tokenizer import Tokenizer
from models.transformer import Params

Checkpoint = tuple[TransformerConfig, Params, Tokenizer | None]


def from_llama2c(source: Path, tokenizer: Path | None) -> Checkpoint:
    """llama2.c `.bin` files, version 0 or Q8_0 version 2, with their `tokenizer.bin`."""
    config, params = read_llama2c(source)
    return config, params, read_llama2c_tokenizer(tokenizer, config.vocab_size) if tokenizer else None


# Format name -> reader of (source, tokenizer file or None).
READERS: dict[str, Callable[[Path, Path | None], Checkpoint]] = {"llama2c": from_llama2c}


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """The command; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m scripts.convert", description=__doc__.splitlines()[0])
    parser.add_argument("--from", dest="format", required=True, choices=sorted(READERS), help="format of the source")
    parser.add_argument("--src", type=Path, required=True, help="checkpoint file")
    parser.add_argument("--tokenizer", type=Path, help="its tokenizer file")
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--overwrite", action="store_true", help="replace a target directory that exists")
    args = parser.parse_args(argv)
    # Said before the work, which takes minutes for large models; save_target holds to it again.
    if args.out.exists() and not args.overwrite:
        raise UserError(f"{args.out} already exists; --overwrite replaces it")
    config, params, tokenizer = READERS[args.format](args.src, args.tokenizer)
    save_target(args.out, config, params, tokenizer, overwrite=args.overwrite)
    print(
        f"wrote {args.out}: {config.family}, {config.num_layers} layers, width {config.width}, "
        f"vocabulary {config.vocab_size}, {'with' if tokenizer else 'without'} tokenizer"
    )


if __name__ == "__main__":
    main()
