"""Coprocessor directories: `coprocessor.json` (`models.coprocessor.CoprocessorConfig` and the fingerprint of its base)
and `model.safetensors`."""

import functools
from pathlib import Path
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from models import coprocessor, schema
from models.coprocessor import CoprocessorConfig
from models.errors import UserError
from models.formats.beside import check_base, read_beside, save_beside
from models.formats.target import Target
from models.formats.text_files import read_json
from models.pages import in_huge_pages
from models.sharding import mesh_of
from models.transformer import Params

RECORD = "coprocessor.json"


class Coprocessor(NamedTuple):
    """A coprocessor ready for decoding.

    Attributes:
      config: what it is.
      params: its parameters (`models.coprocessor.for_decoding`).
    """

    config: CoprocessorConfig
    params: Params


def save_coprocessor(
    directory: str | Path, config: CoprocessorConfig, params: Params, base: dict, *, overwrite: bool = False
) -> None:
    """Writes a coprocessor directory, whole or not at all.

    Args:
      directory: to be made.
      config: what it is.
      params: its parameters, layers stacked.
      base: `Target.fingerprint()` of the target it was made for.
      overwrite: replace a coprocessor directory that is already there.
    """
    save_beside(directory, RECORD, {**schema.resolved(config), "base": base}, params, overwrite)


def load_coprocessor(directory: str | Path, target: Target, mesh: Mesh | None = None) -> Coprocessor:
    """Reads a coprocessor directory.

    Args:
      directory: of the coprocessor.
      target: what it will serve; it must be the base that it was trained on.
      mesh: shards the parameters over it by `models.sharding.RULES`; None is the mesh that the target was loaded on, or
        the default device.

    Raises:
      UserError: no such directory, a damaged one, or another base.
    """
    path = Path(directory) / RECORD
    if not path.is_file():
        raise UserError(f"{directory} is no coprocessor directory: there is no {path}")
    record = read_json(path)
    entries = {name: value for name, value in record.items() if name != "base"}
    config = schema.parse(CoprocessorConfig, entries, place=str(path))
    check_base(path, record, target)
    fresh = functools.partial(coprocessor.init_params, config, target.config)
    shapes = jax.eval_shape(fresh, target.params, jax.random.key(0))
    mesh = mesh_of(target.params) if mesh is None else mesh
    params = read_beside(path.parent, RECORD, shapes, mesh)
    return Coprocessor(config, in_huge_pages(coprocessor.for_decoding(config, params, mesh)))
