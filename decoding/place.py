"""Text index, cache slot and position: three numbers of a batch row that agree for plain text and nowhere else.

A token of the text has an index in it, a row of the target a slot in the cache and a position that RoPE sees. Whatever
occupies the cache without being text (latents, prompt embeddings) takes slots and positions and no index. Everything
asks this struct; nothing else assumes that they agree.
"""

from flax import struct
from jaxtyping import Array, Int


@struct.dataclass
class Place:
    """Where each batch row stands.

    Attributes:
      length: committed tokens of text; the root has this index. Draws are keyed by it.
      slots: cache slots in use, which the next rows go behind.
    """

    length: Int[Array, "B"]
    slots: Int[Array, "B"]

    @classmethod
    def of_text(cls, length: Int[Array, "B"]) -> "Place":
        """Behind `length` tokens of plain text, each in a slot of its own."""
        return cls(length, length)

    @property
    def position(self) -> Int[Array, "B"]:
        """Of the root, and of whatever is fed next."""
        return self.slots

    def positions(self, ahead: Int[Array, "#B R"]) -> Int[Array, "B R"]:
        """Of rows that stand `ahead` places behind the committed ones; 0 is the root's."""
        return self.position[:, None] + ahead

    def after(self, count: Int[Array, "B"]) -> "Place":
        """The place `count` tokens of text further on."""
        return Place(self.length + count, self.slots + count)
