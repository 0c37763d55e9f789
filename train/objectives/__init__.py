"""Objectives by the name that a config gives in `objective.name`."""

from train.objectives.classifier import ImageClassifier
from train.objectives.code_refiner import CodeRefiner
from train.objectives.coprocessor import CoprocessorObjective
from train.objectives.dflash import DFlashObjective
from train.objectives.distill import DistillObjective
from train.objectives.draft_heads import DraftHeads
from train.objectives.dspark import DominoObjective, DSparkObjective
from train.objectives.eagle import Eagle3Objective, EagleObjective
from train.objectives.early_exit import EarlyExitObjective
from train.objectives.encoder_decoder import EncoderDecoder
from train.objectives.exits import Exits
from train.objectives.falcon import FalconObjective
from train.objectives.lm import LM
from train.objectives.minillm import MiniLLMObjective
from train.objectives.objective import Objective
from train.objectives.p_eagle import PEagleObjective
from train.objectives.several import SeveralObjective
from train.objectives.var import VARObjective
from train.objectives.vqvae import VQVAEObjective

OBJECTIVES: dict[str, type[Objective]] = {
    "lm": LM,
    "exits": Exits,
    "encoder_decoder": EncoderDecoder,
    "draft_heads": DraftHeads,
    "eagle": EagleObjective,
    "eagle3": Eagle3Objective,
    "p_eagle": PEagleObjective,
    "dflash": DFlashObjective,
    "dspark": DSparkObjective,
    "domino": DominoObjective,
    "falcon": FalconObjective,
    "early_exit": EarlyExitObjective,
    "distill": DistillObjective,
    "minillm": MiniLLMObjective,
    "several": SeveralObjective,
    "coprocessor": CoprocessorObjective,
    "vqvae": VQVAEObjective,
    "var": VARObjective,
    "code_refiner": CodeRefiner,
    "image_classifier": ImageClassifier,
}
