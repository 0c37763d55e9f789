"""Trains DFlash (arXiv 2602.06036) on a frozen target: a network that fills a block of tokens in one pass.

    python -m train.main --config=configs/dflash.py --config.objective.target=runs/lm/target --workdir=runs/dflash

A step costs the target's forward pass and the network's passes over as many rows as there are blocks times rows of a
block; scores over the vocabulary exist of a piece of them at a time. Expected result: a drafter directory,
runs/dflash/drafter, that decodes with a chain of its best tokens; accuracy falls with the slot, because slots do not
know each other's tokens. `--policy slots:depth=7,total=32` makes the best tree of the same pass, and
`--policy static:tree=chain:7,draws=without` draws the chain. With `--config.objective.vocabulary=8192` slots are scored
on the most frequent labels of the training split alone; the whole head is most of what a draft costs on a small target.

The default differs from the paper in its size (3 layers of the target's width, blocks of 8, 64 blocks per row), its
weights (D-PACE) and its optimizer, Muon. `configs/dflash.py:paper` has the published numbers: 5 layers, blocks of 16,
slot k weighing exp(-k/7), 512 blocks per row of 3,072 tokens, AdamW at 6e-4 (beta 0.9, 0.999) without weight decay, 4%
of the steps for warm-up, a cosine to 0, gradients cut at 1. `configs/dflash.py:dflash2` adds DFlash2's convolution and
its choice among 16 candidates to the default.

Expected time: for SmolLM2-135M 551 steps of 8 x 512 tokens, with a draft vocabulary of 8,192 and 128 blocks per row,
took 94 s (135 s for `:dflash2`) on one NVIDIA H200, seven other heads learning beside it (docs/results.md).
`configs/dflash.py:smoke` takes 20 short steps, within 1 min on two CPU cores for targets of up to 10M parameters;
expect falling losses and equal `loop` and `replay` shares.
"""

from ml_collections import ConfigDict, config_dict

from configs import check_variant


def get_config(variant: str = "") -> ConfigDict:
    check_variant(variant, "paper", "dflash2", "smoke")
    config = ConfigDict()
    config.objective = ConfigDict(
        {
            "name": "dflash",
            "target": config_dict.placeholder(str),
            "num_layers": 3,
            "block": 8,
            "d_pace": True,
            "anchors": 64,
        }
    )
    config.data = ConfigDict({"path": "data/python"})
    config.steps = 400
    config.batch_size = 16
    config.length = 256
    config.optimizer = ConfigDict({"name": "muon", "learning_rate": 5e-3, "warmup_steps": 20})
    config.evaluation = ConfigDict({"every": 200, "batches": 16})
    config.checkpoint = ConfigDict({"every": 100})

    if variant == "paper":
        config.objective.update(num_layers=5, block=16, d_pace=False, pace=7.0, anchors=512)
        config.optimizer = ConfigDict(
            {"name": "adamw", "learning_rate": 6e-4, "b2": 0.999, "warmup_steps": 1000, "final_fraction": 0.0}
        )
        config.steps, config.batch_size, config.length = 25_000, 64, 3072
        config.evaluation.update(every=1000, batches=8)
        config.checkpoint.every = 500
    if variant == "dflash2":
        config.objective.update(convolution=True, candidates=16)
    if variant == "smoke":
        config.steps, config.batch_size, config.length = 20, 4, 128
        config.optimizer.warmup_steps = 2
        config.evaluation.update(every=10, batches=2)
        config.checkpoint.every = 10
        config.metrics = ConfigDict({"every": 5})
        config.objective.update(num_layers=1, block=4, anchors=16, loop_tokens=32)
    return config
