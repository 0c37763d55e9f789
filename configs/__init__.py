"""Experiments as data: one file per job, whose `get_config(variant)` returns a `ConfigDict`.

The schema is `train/config.py`, and a file says only what differs from its defaults; a command line may name every key
of it. Tuples, never lists, so that a command line can replace them; `config_dict.placeholder` where None is a value, so
that a command line can fill it.
"""

import difflib


def check_variant(variant: str, *known: str) -> None:
    """Raises ValueError unless `variant` is empty or known."""
    if variant not in ("", *known):
        near = difflib.get_close_matches(variant, known, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"there is no variant {variant!r}{hint}, only {', '.join(known)}")
