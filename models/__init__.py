"""What is computed: pure functions of (parameters, inputs), and the import and export of checkpoints.

`from models import load_target` is the way in. It is resolved on first use, so that importing one module of this
package does not import them all.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from models.formats.target import Target, load_target

__all__ = ["Target", "load_target"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from models.formats import target

        return getattr(target, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
