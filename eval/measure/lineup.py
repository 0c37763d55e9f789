"""Drafters to time, as published, with random parameters for a target of any shape."""

import dataclasses
from collections.abc import Callable

from decoding.drafter import Drafter
from decoding.drafters.dflash import DFlash
from decoding.drafters.draft_model import DraftModel
from decoding.drafters.dspark import DSpark
from decoding.drafters.eagle import Eagle, Eagle3
from decoding.drafters.early_exit import EarlyExit
from decoding.drafters.falcon import Falcon
from decoding.drafters.hydra import Hydra
from decoding.drafters.lookahead import Lookahead
from decoding.drafters.medusa import Medusa
from decoding.drafters.p_eagle import PEagle
from decoding.drafters.prompt_lookup import PromptLookup
from decoding.drafters.token_recycling import TokenRecycling
from decoding.policies import Confidence, Slots, Static, StochasticBeam
from decoding.trees import chain
from models.config import TransformerConfig
from models.heads.dflash import DFlashHeads, dflash_layers
from models.heads.eagle import Eagle3Heads, EagleHeads, eagle3_layers
from models.heads.hydra import HydraHeads
from models.heads.medusa import MedusaHeads
from models.heads.p_eagle import PEagleHeads


def draft_shape(target: TransformerConfig) -> TransformerConfig:
    """A draft model for a target of that shape: a third of its width, two layers."""
    heads = max(1, target.num_heads // 3)
    width = heads * target.head_dim
    return dataclasses.replace(
        target, width=width, num_layers=2, num_heads=heads, num_kv_heads=heads, mlp_width=8 * width // 3
    )


# As published, each for a target of the given shape, but for `dflash-vocabulary`, which scores fewer tokens, and
# `dflash-shallow`, which has fewer layers, too, in the published proportion of 5 to a target's 36.
DRAFTERS: dict[str, Callable[[TransformerConfig], Drafter]] = {
    "medusa": lambda target: Medusa(MedusaHeads()),
    "hydra": lambda target: Hydra(HydraHeads()),
    "hydra++": lambda target: Hydra(HydraHeads(num_layers=4, prefix=True)),
    "eagle3": lambda target: Eagle3(Eagle3Heads(*_features(target)), Confidence()),
    "eagle2": lambda target: Eagle(EagleHeads(), Confidence()),
    "token_recycling": lambda target: TokenRecycling(),
    "prompt_lookup": lambda target: PromptLookup(),
    "lookahead": lambda target: Lookahead(),
    "draft_model": lambda target: DraftModel(draft_shape(target), Static()),
    "rsd-s": lambda target: DraftModel(draft_shape(target), StochasticBeam()),
    "early_exit": lambda target: EarlyExit(max(1, target.num_layers // 6), Static()),
    "falcon": lambda target: Falcon(),
    "dflash": lambda target: DFlash(_block(target, 16), Static(chain(15), "top")),
    "dflash-vocabulary": lambda target: DFlash(_block(target, 16, vocabulary=8192), Static(chain(15), "top")),
    "dflash-shallow": lambda target: DFlash(
        _block(target, 16, vocabulary=8192, layers=max(1, round(target.num_layers * 5 / 36))), Static(chain(15), "top")
    ),
    "dflash-tree": lambda target: DFlash(_block(target, 16), Slots(depth=15, total=60)),
    "dspark": lambda target: DSpark(_block(target, 7, shifted=True), Static(chain(7)), candidates=16),
    "dspark-lattice": lambda target: DSpark(
        _block(target, 7, shifted=True), Confidence(top_k=4, depth=7, total=60), candidates=16
    ),
    "p_eagle": lambda target: PEagle(PEagleHeads(*_features(target))),
}


def _features(target: TransformerConfig) -> tuple[int, int, int, int]:
    """The three layers that EAGLE-3 reads, and the size of its vocabulary."""
    return *eagle3_layers(target.num_layers), min(32_000, target.vocab_size)


def _block(
    target: TransformerConfig, size: int, shifted: bool = False, vocabulary: int = 0, layers: int = 5
) -> DFlashHeads:
    """Layers that read as many of the target's, and at most as many tokens as it has."""
    read, few = dflash_layers(target.num_layers, layers), min(vocabulary, target.vocab_size)
    return DFlashHeads(read, target.vocab_size - 1, num_layers=layers, block=size, shifted=shifted, vocab_size=few)
