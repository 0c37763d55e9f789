"""Trains Domino (arXiv 2605.29707) on a frozen target: blocks filled in one pass, corrected by a GRU over their tokens.

    python -m train.main --config=configs/domino.py --config.objective.target=runs/lm/target --workdir=runs/domino

A step costs what one of `configs/dspark.py` costs for as many rows of blocks. For the first half of the run
(`objective.decay`) the network also learns to guess without the correction, ever less. Expected result: a drafter
directory, runs/domino/drafter, of the method dspark with a GRU for its serial head, which decodes with a drawn chain.

The default differs from the released recipe in its size (3 layers, blocks of 8, 64 of them per row) and its optimizer,
Muon. `configs/domino.py:paper` has the recipe's numbers: 5 layers, blocks of 16, 256 per row of 3,072 tokens, slot k
weighted by exp(-k/7), AdamW at 6e-4 without weight decay, 4% of the steps for warm-up and a cosine to 0, and the
uncorrected guess learnt to the end of the run.

Expected time: for SmolLM2-135M 551 steps of 8 x 512 tokens, with a draft vocabulary of 8,192 and 128 blocks per row,
took 115 s on one NVIDIA H200, seven other heads learning beside it (docs/results.md). `configs/domino.py:smoke` takes
20 short steps, within 1 min on two CPU cores for targets of up to 10M parameters; expect falling losses and equal
`loop` and `replay` shares.
"""

from ml_collections import ConfigDict, config_dict

from configs import check_variant, dflash


def get_config(variant: str = "") -> ConfigDict:
    check_variant(variant, "paper", "smoke")
    config = dflash.get_config(variant)
    config.objective = ConfigDict(
        {
            "name": "domino",
            "target": config_dict.placeholder(str),
            "num_layers": 3,
            "block": 8,
            "state": 256,
            "pace": 4.0,
            "anchors": 64,
        }
    )
    if variant == "paper":
        config.objective.update(num_layers=5, block=16, state=1024, pace=7.0, anchors=256, decay=1.0)
    if variant == "smoke":
        config.objective.update(num_layers=1, anchors=16, rank=32, state=32, loop_tokens=32)
    return config
