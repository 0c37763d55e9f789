"""Trains DSpark (arXiv 2607.05147) on a frozen target: blocks filled in one pass, and a bigram that joins their slots.

    python -m train.main --config=configs/dspark.py --config.objective.target=runs/lm/target --workdir=runs/dspark

A step costs the target's forward pass and the network's passes over as many rows as there are blocks times rows of a
block; scores over the vocabulary exist of a piece of them at a time. Expected result: a drafter directory,
runs/dspark/drafter, that decodes with a drawn chain of 7 and says how sure it is; `--policy scheduled:threshold=0.5`
cuts chains by that, and `--policy confidence:top_k=4,depth=5,total=24` makes a tree whose branches know their parents.

`--config.objective.head=gated` and `rnn` are the other serial heads. The default differs from the paper in its size (3
layers of the target's width, 64 blocks per row) and its optimizer, Muon. `configs/dspark.py:paper` has the published
numbers: 5 layers, 512 blocks per row of 4,096 tokens, DFlash's optimizer (AdamW at 6e-4, a cosine to 0), ten epochs of
1.3 million answers of the target in batches of 512 rows.

Expected time: for SmolLM2-135M 551 steps of 8 x 512 tokens, with a draft vocabulary of 8,192 and 128 blocks per row,
took 119 s on one NVIDIA H200, seven other heads learning beside it (docs/results.md). `configs/dspark.py:smoke` takes
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
            "name": "dspark",
            "target": config_dict.placeholder(str),
            "num_layers": 3,
            "anchors": 64,
        }
    )
    if variant == "paper":
        config.objective.update(num_layers=5, anchors=512)
        config.batch_size, config.length = 512, 4096
    if variant == "smoke":
        config.objective.update(num_layers=1, anchors=16, rank=32, loop_tokens=32)
    return config
