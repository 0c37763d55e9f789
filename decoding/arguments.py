"""What people hand to `generate`, checked: every complaint is one sentence that says what was expected.

Annotations here are wide on purpose: what arrives may be anything.
"""

import functools
import numbers
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from decoding.augment import Augment
from decoding.drafter import Drafter
from decoding.drafters.plain import Plain
from decoding.sampling import Sampling
from decoding.verify import Typical
from models.config import TransformerConfig
from models.errors import UserError
from models.formats.storage import leaves_by_path
from models.formats.target import Target
from models.transformer import param_shapes


def checked_prompts(prompts: Any, target: Target) -> list[list[int]]:
    """Prompts as lists of token ids.

    Raises:
      UserError: they are something else, there is none, one is empty, or a token has no embedding.
    """
    if not _is_listed(prompts):
        raise UserError(f"prompts must be lists of token ids, one per prompt, got {_described(prompts)}")
    if len(prompts) == 0:
        raise UserError("there is no prompt to decode")
    if not any(_is_listed(prompt) for prompt in prompts):
        if isinstance(prompts[0], str):
            how = "encode each of them: [target.tokenizer.encode(text) for text in texts]"
        else:
            how = "put one prompt in a list of its own: [tokens]"
        raise UserError(f"prompts must be lists of token ids, one per prompt, got a list of {_kind(prompts[0])}: {how}")
    return [_checked_prompt(prompt, row, target) for row, prompt in enumerate(prompts)]


def _checked_prompt(prompt: Any, row: int, target: Target) -> list[int]:
    vocab_size = target.config.vocab_size
    if not _is_listed(prompt):
        raise UserError(f"prompt {row} must be a list of token ids, got {_described(prompt)}")
    if len(prompt) == 0:
        raise UserError(f"prompt {row} is empty: a text needs at least one token to begin with")
    tokens = _whole_numbers(prompt)
    if tokens is None:
        wrong = next(token for token in prompt if not _is_whole(token))
        raise UserError(f"prompt {row} must hold token ids, which are whole numbers, got {_described(wrong)}")
    if bad := [token for token in tokens if not 0 <= token < vocab_size]:
        name = target.tokenizer.core.id_to_token(bad[0]) if target.tokenizer and 0 <= bad[0] < 2**32 else None
        called = f" ({name})" if name else ""
        raise UserError(
            f"prompt {row} has token {bad[0]}{called}, outside the target's vocabulary of {vocab_size} embeddings"
        )
    return tokens


def behind_encoder(target: Target, prompts: list[list[int]]) -> tuple[list[list[int]] | None, list[list[int]]]:
    """What an encoder reads, None where there is none, and what the decoder begins with.

    Raises:
      UserError: nothing says what an encoder-decoder's texts begin with, or a prompt is longer than it reads.
    """
    if not target.config.encoder_layers:
        return None, prompts
    for row, prompt in enumerate(prompts):
        if len(prompt) > target.config.max_position:
            raise UserError(
                f"prompt {row} has {len(prompt)} tokens, more than the target's encoder reads, "
                f"{target.config.max_position}"
            )
    return prompts, [target.opening(prompt) for prompt in prompts]


def checked_stops(stop: Any) -> list[list[int]]:
    """Token sequences that end a text.

    Raises:
      UserError: they are something else, or one is empty.
    """
    expected = "stop must be a list of token sequences, such as [[2], [13, 13]]"
    texts = "; texts that end a text go into stop_texts"
    if isinstance(stop, str | bytes):
        raise UserError(f"{expected}, got {_described(stop)}{texts}")
    if not _is_listed(stop):
        raise UserError(f"{expected}, got {_described(stop)}")
    sequences = []
    for sequence in stop:
        tokens = _whole_numbers(sequence) if _is_listed(sequence) else None
        if tokens is None:
            raise UserError(f"{expected}, got {_described(sequence)} in it{texts if isinstance(sequence, str) else ''}")
        if not tokens:
            raise UserError("a stop sequence is empty")
        if not 0 <= min(tokens) <= max(tokens) < 2**31:
            bad = min(tokens) if min(tokens) < 0 else max(tokens)
            raise UserError(f"a stop sequence holds the token {bad}: token ids lie between 0 and 2^31")
        sequences.append(tokens)
    return sequences


def whole_per_row(value: Any, batch: int, name: str) -> list[int]:
    """One whole number per row, or one for all.

    Raises:
      UserError: another count, or something that is no whole number.
    """
    rows = per_row(value, batch, name)
    for row in rows:
        if type(row) is not int and not _is_whole(row):
            raise UserError(f"{name} must be a whole number, or one per prompt, got {_described(row)}")
    return [int(row) for row in rows]


def seed_per_row(value: Any, batch: int) -> list[int]:
    """One seed per row, or those that count up from a first one.

    Raises:
      UserError: another count, or a seed that is no whole number in [0, 2^32).
    """
    value = value.tolist() if isinstance(value, np.ndarray | np.generic | jax.Array) else value
    counted = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    seeds = whole_per_row([value + row for row in range(batch)] if counted else value, batch, "seeds")
    if min(seeds) < 0 or max(seeds) >= 2**32:
        raise UserError(f"seeds must be in [0, 2^32), got {min(seeds) if min(seeds) < 0 else max(seeds)}")
    return seeds


def checked_sampling(value: Any, batch: int) -> list[Sampling]:
    """Settings per row. Raises UserError for another count, or something that is no `Sampling`."""
    rows = per_row(value, batch, "sampling")
    for row in rows:
        if not isinstance(row, Sampling):
            raise UserError(f"sampling must be a Sampling, or one per prompt, got {_described(row)}")
    return rows


def per_row(value: Any, batch: int, name: str) -> list:
    """A list of one value per row. Raises UserError for another count."""
    value = value.tolist() if isinstance(value, np.ndarray | jax.Array) else value
    rows = list(value) if _is_listed(value) else [value] * batch
    if len(rows) != batch:
        raise UserError(f"{name} has {len(rows)} entries for {batch} prompts")
    return rows


def at_least_one(value: Any, name: str, unit: str = "") -> int:
    """A whole number above 0 that fits 32 bits. Raises UserError for anything else."""
    if not _is_whole(value):
        raise UserError(f"{name} must be a whole number of at least 1{unit}, got {_described(value)}")
    if not 1 <= value < 2**31:
        raise UserError(f"{name} must be at least 1{unit}, and less than 2^31, got {value}")
    return int(value)


def check_kinds(target: Any, mesh: Any, typical: Any, on_tokens: Any, augment: Any, memory: Any) -> None:
    """Raises UserError where there is no target, or one of the others is neither None nor of its kind."""
    if not isinstance(target, Target):
        raise UserError(f"target must be a Target, as load_target returns it, got a {type(target).__name__}")
    for name, value, kind in (("mesh", mesh, Mesh), ("typical", typical, Typical), ("augment", augment, Augment)):
        if value is not None and not isinstance(value, kind):
            raise UserError(f"{name} must be a {kind.__name__} or None, got {_described(value)}")
    if typical is not None:
        for name, value in (("epsilon", typical.epsilon), ("delta", typical.delta)):
            value = value.item() if isinstance(value, np.generic | jax.Array) and value.ndim == 0 else value
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < np.inf:
                raise UserError(f"typical.{name} must be a number that is not negative, got {_described(value)}")
    if not all(isinstance(leaf, np.ndarray | jax.Array) for leaf in jax.tree.leaves(memory)):
        raise UserError(f"memory must be Generation.memory of an earlier request, got {_described(memory)}")
    if on_tokens is not None and not callable(on_tokens):
        raise UserError(f"on_tokens must be a function of (row, tokens, writers), got {_described(on_tokens)}")


def drafter_and_params(drafter: Any, params: Any, target: Target, mesh: Mesh | None) -> tuple[Drafter, Any]:
    """The drafter, and the parameters that are its own; both may come as the pair that `load_drafter` returns.

    Raises:
      UserError: it is no drafter, cannot serve the target, or the parameters are missing or those of another one.
    """
    if isinstance(drafter, tuple) and len(drafter) == 2 and isinstance(drafter[0], Drafter):
        if params is not None:
            raise UserError("drafter is a pair with its parameters, so drafter_params must not be given too")
        drafter, params = drafter
    drafter = Plain() if drafter is None else drafter
    if not isinstance(drafter, Drafter):
        raise UserError(
            f"drafter must be a drafter, or a pair as load_drafter(NAME, target) returns, got {_described(drafter)}"
        )
    drafter.check(target.config)
    dtype = target.params["embed"]["embedding"].dtype
    released, prepared = _shapes(drafter, target.config, np.dtype(dtype), mesh)
    if params is None and released:
        raise UserError(f"the drafter {drafter.name} has parameters: give them as drafter_params")
    if not released and not drafter.bare_names:
        return drafter, params  # It makes none, and does not go without: what it takes is between it and the caller.
    found = {path: _shape(leaf) for path, leaf in leaves_by_path(params).items()}
    if found not in (released, prepared):
        nearest = prepared if len(set(found) & set(prepared)) > len(set(found) & set(released)) else released
        raise UserError(
            f"drafter_params are not those of the drafter {drafter.name}: {_difference(found, nearest, drafter.name)}"
        )
    return drafter, params


@functools.lru_cache(maxsize=64)
def _shapes(drafter: Drafter, config: TransformerConfig, dtype: np.dtype, mesh: Mesh | None) -> tuple[dict, dict]:
    """Shapes of a drafter's parameters by path: as they are made, and as `for_decoding` leaves them."""

    def made(target, key):
        params = drafter.init_params(config, target, key)
        return params, drafter.for_decoding(params, mesh)

    both = jax.eval_shape(made, param_shapes(config, jnp.dtype(dtype)), jax.random.key(0))
    released, prepared = ({path: _shape(leaf) for path, leaf in leaves_by_path(shapes).items()} for shapes in both)
    return released, prepared


def _difference(found: dict, wanted: dict, name: str) -> str:
    if not wanted:
        return f"{name} has none"
    for path, shape in wanted.items():
        if path not in found:
            return f"{path} is missing"
        if found[path] != shape:
            return f"{path} has shape {list(found[path] or ())}, expected {list(shape)}"
    return f"{min(set(found) - set(wanted)) or 'something'} is unknown to it"


def _shape(leaf: Any) -> tuple[int, ...] | None:
    return tuple(leaf.shape) if hasattr(leaf, "shape") else None


def _is_listed(value: Any) -> bool:
    if isinstance(value, np.ndarray | jax.Array):
        return value.ndim > 0
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _is_whole(value: Any) -> bool:
    if isinstance(value, np.ndarray | jax.Array):
        return value.ndim == 0 and jnp.issubdtype(value.dtype, jnp.integer)
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _whole_numbers(values: Any) -> list[int] | None:
    """The values as a list of ints, or None where one of them is none."""
    if isinstance(values, np.ndarray | jax.Array):
        whole = values.ndim == 1 and jnp.issubdtype(values.dtype, jnp.integer)
        return np.asarray(values).tolist() if whole else None
    if all(type(value) is int for value in values):  # The usual case, in a fraction of the time.
        return list(values)
    return [int(value) for value in values] if all(_is_whole(value) for value in values) else None


def _kind(value: Any) -> str:
    return "texts" if isinstance(value, str) else f"{type(value).__name__} values"


def _described(value: Any) -> str:
    if isinstance(value, str):
        return f"the text {value[:40]!r}"
    if isinstance(value, np.ndarray | jax.Array):
        return f"an array of {value.dtype} of shape {list(value.shape)}"
    short = repr(value)
    return short if len(short) <= 60 and "\n" not in short else f"a {type(value).__name__}"
