"""Every drafter by name, and drafter directories.

A drafter directory is `drafter.json` (method, hyper-parameters, tree, fingerprint of its base) and, where the method
has parameters, `model.safetensors`, whose tensors are named by their path in the parameter tree
(`heads.0.vocab.kernel`, as [in, out]); kernels may be kept as small integers (`models/formats/scaled.py`). On a
command line a drafter is its directory, the bare name of one that has no parameters or of one that the package carries
(`trained/`), such a name with a number (`bare_names`), or several of these joined by `+`: each is asked where those
before it find nothing. Alone and without a number a name leaves open how many candidates there are
(`decoding/sizing.py`), and so does `DIR:auto`, with trees that are parts of the directory's own.

This file is all that knows drafters by name: it parses, loads and saves them.
"""

import dataclasses
import functools
import typing
from pathlib import Path

import jax
from jax.sharding import Mesh

from decoding.drafter import Drafter
from decoding.drafters.dflash import DFlash
from decoding.drafters.draft_model import DraftModel
from decoding.drafters.dspark import DSpark
from decoding.drafters.eagle import Eagle, Eagle3
from decoding.drafters.early_exit import EarlyExit
from decoding.drafters.falcon import Falcon
from decoding.drafters.first_of import FirstOf
from decoding.drafters.hydra import Hydra
from decoding.drafters.lookahead import Lookahead
from decoding.drafters.medusa import Medusa
from decoding.drafters.nested import Nested
from decoding.drafters.oracle import Oracle
from decoding.drafters.p_eagle import PEagle
from decoding.drafters.plain import Plain
from decoding.drafters.prompt_lookup import PromptLookup
from decoding.drafters.token_recycling import TokenRecycling
from decoding.policies import TreePolicy, read_policy
from decoding.trees import Topology
from models import schema
from models.errors import UserError
from models.formats.beside import check_base, read_beside, save_beside
from models.formats.storage import write_json
from models.formats.target import Target
from models.formats.text_files import read_json
from models.pages import in_huge_pages
from models.sharding import mesh_of

DRAFTERS: dict[str, type[Drafter]] = {
    "none": Plain,
    "draft_model": DraftModel,
    "medusa": Medusa,
    "hydra": Hydra,
    "eagle": Eagle,
    "eagle3": Eagle3,
    "p_eagle": PEagle,
    "dflash": DFlash,
    "dspark": DSpark,
    "falcon": Falcon,
    "nested": Nested,
    "token_recycling": TokenRecycling,
    "prompt_lookup": PromptLookup,
    "lookahead": Lookahead,
    "early_exit": EarlyExit,
    "first_of": FirstOf,
    "oracle": Oracle,
}

# Drafter directories that travel with the package; each is found by its folder's name.
TRAINED = Path(__file__).with_name("trained")

# Behind a directory: as many candidates as pay.
AUTO = ":auto"

# What a record holds beside the drafter itself: the fingerprint of its base, where converted weights came from, and of
# one that the package carries acceptance lengths by number of candidates.
BESIDES = ("base", "provenance", "sizes")

# Entries by the names that they had in Tandem 0.1; a combination of that version was a pair, `first` and `second`.
RENAMED = {"growth": "policy"}
PAIR = ("first", "second")

# Entries that methods of Tandem 0.1 got later, which its directories lack: the default is what they were then. Entries
# within a section, such as `heads`, may be left out without a word here (`models/schema.py`).
ADDED = {"early_exit": ("lens",)}


def save_drafter(
    directory: str | Path,
    drafter: Drafter,
    params,
    base: dict,
    *,
    overwrite: bool = False,
    provenance: dict | None = None,
) -> None:
    """Writes a drafter directory, whole or not at all.

    Args:
      directory: to be made.
      drafter: its static part.
      params: its parameters.
      base: `Target.fingerprint()` of the target it was made for.
      overwrite: replace a drafter directory that is already there.
      provenance: what it was made from, for people; kept in `drafter.json`, and nothing depends on it.
    """
    origin = {} if provenance is None else {"provenance": provenance}
    save_beside(directory, "drafter.json", {**drafter.to_record(), "base": base, **origin}, params, overwrite)


def load_drafter(spec: str | Path, target: Target, mesh: Mesh | None = None) -> tuple[Drafter, typing.Any]:
    """A drafter and its parameters, from what a command line says.

    Args:
      spec: a directory, a bare name, `NAME:NUMBER`, `DIR:auto`, or several of these joined by `+` (see above).
        `generate` chooses the number of candidates of a bare name, and of `DIR:auto`, by what they cost here.
      target: what it will draft for; it must be the base that the drafter was trained on.
      mesh: shards the parameters over it by `models.sharding.RULES`; None is the mesh that the target was loaded on, or
        the default device.

    Raises:
      UserError: no such drafter, a damaged directory, or another base, tokenizer, or vocabulary.
    """
    name, directory = str(spec), Path(spec)
    method, _, argument = name.partition(":")
    # A colon with nothing behind it is a number that got lost, and no leave to choose one.
    named = DRAFTERS[method].from_name(argument) if method in DRAFTERS and name != f"{method}:" else None
    if named is not None:
        return (named if argument else named.opened(named.known_sizes)), None
    whole = name.removesuffix(AUTO)
    if whole != name and not (directory / "drafter.json").is_file():
        drafter, params = load_drafter(whole, target, mesh)
        return (drafter if drafter.open_sizes else drafter.opened()), params
    carried = False
    if not (directory / "drafter.json").is_file() and (method == name or argument.isdecimal()):
        carried = method in trained_drafters()
        directory = trained_drafters().get(method, directory)
    if not (directory / "drafter.json").is_file():
        if "+" in name:
            parts = [load_drafter(part, target, mesh) for part in split_names(name, "+")]
            # A combination is as large as its largest part, so that each has the size that it was published with.
            return FirstOf(tuple(drafter for drafter, _ in parts)), [params for _, params in parts]
        names = [form for drafter in DRAFTERS.values() for form in drafter.bare_names] + list(trained_drafters())
        raise UserError(
            f"{name!r} is neither a drafter directory (there is no {directory / 'drafter.json'}) nor one of "
            f"{', '.join(names)}, or several of these joined by +"
        )
    record = read_json(directory / "drafter.json")
    drafter = build(record, str(directory / "drafter.json"))
    check_base(directory / "drafter.json", record, target)
    drafter.check(target.config)
    shapes = jax.eval_shape(functools.partial(drafter.init_params, target.config), target.params, jax.random.key(0))
    mesh = mesh_of(target.params) if mesh is None else mesh
    params = read_beside(directory, "drafter.json", shapes, mesh, lambda name: _present_name(name, record))
    if carried:
        drafter = _of_size(drafter, argument, record, name)
    return drafter, in_huge_pages(drafter.for_decoding(params, mesh))


def _of_size(drafter: Drafter, candidates: str, record: dict, name: str) -> Drafter:
    """One that the package carries, with so many candidates; open without a number."""
    if not candidates:
        return drafter.opened(tuple((int(size), float(length)) for size, length in record["sizes"]))
    fitted = drafter.with_budget(int(candidates)) if int(candidates) else None
    if fitted is None:
        raise UserError(f"{name!r}: there is no tree of {candidates} candidates for this drafter")
    return fitted


def trained_drafters() -> dict[str, Path]:
    """The drafter directories that the package carries, by name."""
    return {path.parent.name: path.parent for path in sorted(TRAINED.glob("*/drafter.json"))}


def write_tree(directory: str | Path, tree: Topology | TreePolicy) -> None:
    """Replaces the tree of a drafter directory, or the policy that makes its trees. Raises UserError without one."""
    path = Path(directory) / "drafter.json"
    if not path.is_file():
        raise UserError(f"{directory} is no drafter directory, so no tree can be written: copy the drafter into one")
    name = "tree" if isinstance(tree, Topology) else "policy"
    record = {RENAMED.get(key, key): value for key, value in read_json(path).items()} | {name: tree.to_record()}
    partial = path.with_name(".drafter.json.partial")
    try:
        write_json(partial, record)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def build(record: dict, where: str) -> Drafter:
    """A drafter from its JSON record, which may also hold `base` and `provenance`.

    Raises:
      UserError: an unknown method, an unknown or missing entry, a hyper-parameter that the method does not have or of
        the wrong type, or a tree that is not closed.
    """
    return read_drafter({key: value for key, value in record.items() if key not in BESIDES}, "", where)


def read_drafter(raw: typing.Any, where: str, place: str) -> Drafter:
    """A drafter of any method from its record, the entry `where` of `place`.

    Raises:
      UserError: an unknown method, or an entry that is unknown, missing or of the wrong type.
    """
    method = raw.get("method") if isinstance(raw, dict) else None
    if not isinstance(method, str) or method not in DRAFTERS:
        raise UserError(f"{place} names the method {method!r}; known are {', '.join(DRAFTERS)}")
    entries = {RENAMED.get(key, key): _immutable(value) for key, value in raw.items() if key != "method"}
    if _is_pair(raw):
        entries = {"parts": tuple(part for _, part in _parts_of_pair(raw))}
    for field in dataclasses.fields(typing.cast(typing.Any, DRAFTERS[method])):
        if field.name not in entries and field.name not in ADDED.get(method, ()):
            raise UserError(f"{place} has no entry {field.name!r}")
    readers = {Drafter: read_drafter, TreePolicy: read_policy}
    return schema.parse(DRAFTERS[method], entries, where, place, readers=readers)


def _is_pair(record: typing.Any) -> bool:
    return isinstance(record, dict) and all(name in record for name in PAIR)


def _parts_of_pair(record: dict, prefix: str = "") -> list[tuple[str, dict]]:
    """The drafters of a combination of version 0.1, pairs in pairs flattened, each with the prefix of its tensors."""
    parts: list[tuple[str, dict]] = []
    for name in PAIR:
        inside = f"{prefix}{name}."
        parts += _parts_of_pair(record[name], inside) if _is_pair(record[name]) else [(inside, record[name])]
    return parts


def _present_name(tensor: str, record: dict) -> str:
    """A tensor's name as it would be written today."""
    if _is_pair(record):
        for index, (prefix, _) in enumerate(_parts_of_pair(record)):
            if tensor.startswith(prefix):
                return f"{index}.{tensor.removeprefix(prefix)}"
    return tensor


def split_names(text: str, separator: str = ",") -> list[str]:
    """The drafters in a list of them; a directory may have the separator in its name, as often as it likes."""
    pieces = text.split(separator)
    names: list[str] = []
    start = 0
    while start < len(pieces):
        ends = range(len(pieces), start + 1, -1)
        joined = (separator.join(pieces[start:end]).strip() for end in ends)
        whole = ((name, end) for name, end in zip(joined, ends, strict=True) if _is_one(name, separator))
        name, start = next(whole, (pieces[start].strip(), start + 1))
        names.append(name)
    # Between commas nothing may stand; between pluses it is a mistake, which whoever loads it names.
    return names if separator == "+" else [name for name in names if name]


def _is_one(text: str, separator: str) -> bool:
    """Whether the separators in `text` all belong to names of directories, perhaps of several joined by `+`."""
    parts = [text] if separator == "+" else split_names(text, "+")
    return all(separator not in part or (Path(part) / "drafter.json").is_file() for part in parts)


def _immutable(value: typing.Any) -> typing.Any:
    """JSON with tuples for its lists, which is what frozen dataclasses hold."""
    if isinstance(value, dict):
        return {key: _immutable(item) for key, item in value.items()}
    return tuple(map(_immutable, value)) if isinstance(value, list) else value
