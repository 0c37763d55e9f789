"""Drafters: one file per method, and `registry.py`, which knows them by name, loads and saves them.

`from decoding.drafters import load_drafter` is the way in. It is resolved on first use, so that importing one drafter
does not import them all.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from decoding.drafters.registry import load_drafter, save_drafter

__all__ = ["load_drafter", "save_drafter"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from decoding.drafters import registry

        return getattr(registry, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
