"""The shapes of image models: the multi-scale VQ-VAE and the VAR transformer over its codes (Tian et al. 2024).

An image becomes K square maps of codes whose sides p_0 < ... < p_{K-1} are its *scales*; map k comes after all smaller
ones in a sequence of L = sum p_k^2 codes. Both models of a pair have the same scales, vocabulary and latent channels.
"""

import dataclasses
import itertools
from collections.abc import Sequence

from models.schema import require

# The published schedules, by the side of the image in pixels.
SCHEDULES: dict[str, tuple[int, ...]] = {
    "256": (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    "512": (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
}


def scale_starts(scales: Sequence[int]) -> tuple[int, ...]:
    """Where each scale begins in the sequence, K + 1 places: the last is L, one past the end."""
    return (0, *itertools.accumulate(p * p for p in scales))


def _check(config: "VQVAEConfig | VARConfig", names: Sequence[str]) -> None:
    for name in names:
        require(getattr(config, name) >= 1, f"{name} must be at least 1", getattr(config, name))
    s = config.scales
    rising = len(s) >= 2 and s[0] >= 1 and all(a < b for a, b in itertools.pairwise(s))
    require(rising, "scales must be two or more rising sides of 1 or more", list(s))


@dataclasses.dataclass(frozen=True)
class VQVAEConfig:
    """Sizes of a multi-scale VQ-VAE; the defaults are those of the published one.

    Attributes:
      vocab_size: V, rows of the codebook.
      latent_channels: of the features, and of a code.
      width: channels at full resolution.
      multipliers: of the width at every level, full resolution first; each further level halves the sides.
      blocks: residual blocks per level of the encoder; the decoder has one more.
      scales: sides of the maps of codes.
      phis: residual convolutions that the scales share.
    """

    vocab_size: int = 4096
    latent_channels: int = 32
    width: int = 160
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks: int = 2
    scales: tuple[int, ...] = SCHEDULES["256"]
    phis: int = 4

    def __post_init__(self):
        _check(self, ("vocab_size", "latent_channels", "width", "blocks", "phis"))
        require(
            bool(self.multipliers) and min(self.multipliers) >= 1,
            "multipliers must be one or more numbers of 1 or more",
            list(self.multipliers),
        )

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels at every level, full resolution first."""
        return tuple(self.width * multiplier for multiplier in self.multipliers)

    @property
    def image_size(self) -> int:
        """Side of the images, in pixels."""
        return self.scales[-1] * 2 ** (len(self.multipliers) - 1)

    @property
    def num_scales(self) -> int:
        """K."""
        return len(self.scales)

    @property
    def length(self) -> int:
        """L, codes per image."""
        return scale_starts(self.scales)[-1]


@dataclasses.dataclass(frozen=True)
class VARConfig:
    """Sizes of a VAR transformer.

    Attributes:
      depth: d, blocks.
      width: C, the residual stream; published models have 64 d.
      num_heads: H, which must divide the width; published models have d.
      num_classes: labels 0 to num_classes - 1; one more row of the class embedding stands for none.
      vocab_size: V, codes of the tokenizer.
      latent_channels: of the features that the tokenizer feeds in.
      scales: sides of the maps of codes; the first is 1, because the class begins the sequence as one row.
      shared_modulation: one map from the class to scales, shifts and gates serves all blocks, which add offsets of
        their own (the published 512-pixel model), instead of a map per block.
      mlp_ratio: width of the MLP over C.
    """

    depth: int
    width: int
    num_heads: int
    num_classes: int
    vocab_size: int = 4096
    latent_channels: int = 32
    scales: tuple[int, ...] = SCHEDULES["256"]
    shared_modulation: bool = False
    mlp_ratio: int = 4

    def __post_init__(self):
        sizes = ("depth", "width", "num_heads", "num_classes", "vocab_size", "latent_channels", "mlp_ratio")
        _check(self, sizes)
        require(self.scales[0] == 1, "scales of a VAR must begin with 1, for its start is one row", list(self.scales))
        require(
            self.width % self.num_heads == 0, f"width ({self.width}) must be a multiple of num_heads", self.num_heads
        )

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.width // self.num_heads

    @property
    def num_scales(self) -> int:
        """K."""
        return len(self.scales)

    @property
    def length(self) -> int:
        """L, codes per image."""
        return scale_starts(self.scales)[-1]
