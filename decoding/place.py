"""Text index, cache slot and position: three numbers of a batch row that agree for plain text and nowhere else.

A token of the text has an index in it, a row of the target a slot in the cache and a position that RoPE sees. Whatever
occupies the cache without being text (latents, prompt embeddings) takes slots and positions and no index. Everything
asks this struct; nothing else assumes that they agree.
"""

import dataclasses

from flax import struct
from jaxtyping import Array, Int


@struct.dataclass
class Place:
    """Where each batch row stands.

    Attributes:
      length: committed tokens of text; the root has this index. Draws are keyed by it.
      slots: cache slots in use, which the next rows go behind.
      held: how many of them have no position of their own (latents that stand where the text before them ends); None is
        none.
    """

    length: Int[Array, "B"]
    slots: Int[Array, "B"]
    held: Int[Array, "B"] | None = None

    @classmethod
    def of_text(cls, length: Int[Array, "B"]) -> "Place":
        """Behind `length` tokens of plain text, each in a slot of its own."""
        return cls(length, length)

    @property
    def position(self) -> Int[Array, "B"]:
        """Of the root, and of whatever is fed next."""
        return self.slots if self.held is None else self.slots - self.held

    def positions(self, ahead: Int[Array, "#B R"]) -> Int[Array, "B R"]:
        """Of rows that stand `ahead` places behind the committed ones; 0 is the root's."""
        return self.position[:, None] + ahead

    def after(self, count: Int[Array, "B"]) -> "Place":
        """The place `count` tokens of text further on."""
        return dataclasses.replace(self, length=self.length + count, slots=self.slots + count)

    def back(self, count: Int[Array, ""] | int) -> "Place":
        """The place `count` tokens of text before, with nothing but text in between."""
        return dataclasses.replace(self, length=self.length - count, slots=self.slots - count)

    def behind_latents(self, count: Int[Array, "B"]) -> "Place":
        """The place behind so many latents, which hold their position where anything holds one."""
        held = None if self.held is None else self.held + count
        return Place(self.length, self.slots + count, held)
