"""Trains EAGLE-1's draft layer (Li et al. 2024, arXiv 2401.15077) on a frozen target; EAGLE-2 decodes with the same.

    python -m train.main --config=configs/eagle.py --config.objective.target=runs/lm/target --workdir=runs/eagle

A step costs the target's forward pass and one layer's forward and backward passes. Expected time: 200 steps of 8 x 256
tokens take about 1 min on two CPU cores with stories260K as target; a 12M-parameter target needs about 10 min for the
400 steps of this file. Expected result: a drafter directory, runs/eagle/drafter, with the paper's static tree of 25
candidates. In the paper it commits 3.9 tokens per step where Hydra commits 3.0 (Vicuna-7B, MT-Bench).

The default differs from the paper in its optimizer, Muon, and in that the cross-entropy with the target's distribution
weighs as much as the distance of features. `configs/eagle.py:paper` has the published numbers: a tenth of that
cross-entropy, AdamW at 3e-5 (beta 0.9, 0.95), 2,000 warm-up steps, falling in a line that would reach 0 after 800,000
steps, gradients cut at 0.5 (here their norm, there each element), rows of 2,048 tokens, 4 at a time, and as many steps
as 20 epochs of 68,000 dialogues have.

`configs/eagle.py:smoke` takes 20 short steps, within 1 min on two CPU cores for targets of up to 10M parameters; expect
falling losses and equal `loop` and `replay` shares.
"""

from ml_collections import ConfigDict, config_dict

from configs import check_variant


def get_config(variant: str = "") -> ConfigDict:
    check_variant(variant, "paper", "smoke")
    config = ConfigDict()
    config.objective = ConfigDict(
        {
            "name": "eagle",
            "target": config_dict.placeholder(str),
            "soft": 1.0,
        }
    )
    config.data = ConfigDict({"path": "data/python"})
    config.steps = 400
    config.batch_size = 16
    config.length = 256
    config.optimizer = ConfigDict(
        {
            "name": "muon",
            "learning_rate": 1e-2,
            "warmup_steps": 20,
        }
    )
    config.evaluation = ConfigDict({"every": 200, "batches": 16})
    config.checkpoint = ConfigDict({"every": 100})

    if variant == "paper":
        config.objective.soft = 0.1
        config.optimizer.update(name="adamw", learning_rate=3e-5, schedule="linear", warmup_steps=2000, clip_norm=0.5)
        # 340,000 of the 800,000 steps of the schedule.
        config.optimizer.final_fraction = 0.575
        config.steps, config.batch_size, config.length = 340_000, 4, 2048
        config.evaluation.update(every=17_000, batches=64)
        config.checkpoint.every = 1000
    if variant == "smoke":
        config.steps, config.batch_size, config.length = 20, 4, 128
        config.optimizer.warmup_steps = 2
        config.evaluation.update(every=10, batches=2)
        config.checkpoint.every = 10
        config.metrics = ConfigDict({"every": 5})
        config.objective.loop_tokens = 32
    return config
