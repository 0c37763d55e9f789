"""Trains Medusa-1 heads (Cai et al. 2024) on a frozen target.

    python -m train.main --config=configs/medusa.py --config.objective.target=runs/lm/target --workdir=runs/medusa

A step costs the target's forward pass and the heads' forward and backward passes. Expected time: about 10 min on two
CPU cores for a 12M-parameter target, at the quickstart's 0.7 s per 2,048 tokens. Expected result: a drafter directory,
runs/medusa/drafter; first-choice accuracy falls steeply with depth, because heads do not see each other's guesses.

The default learns from the target: cross-entropy with its distribution (soft labels) alone, under AdamW.
`configs/medusa.py:paper` has the published loss and optimizer instead: cross-entropy with the text, AdamW at
1e-3 with 10 % warm-up, a cosine to 0 and no weight decay; its batch, length and steps stay those of this file. There
`--config.objective.d_pace=True` weighs a head by what it adds to a draft's expected length (D-PACE), as in blocks.

`configs/medusa.py:quickstart` is the short job of `scripts/quickstart.sh --offline`: about 80 s under Muon, enough to
see drafts accepted, too few for the heads' best. `configs/medusa.py:smoke` takes 20 short steps, within 1 min on two
CPU cores for targets of up to 10M parameters; expect falling losses and equal `loop` and `replay` shares.
"""

from ml_collections import ConfigDict, config_dict

from configs import check_variant


def get_config(variant: str = "") -> ConfigDict:
    check_variant(variant, "paper", "quickstart", "smoke")
    config = ConfigDict()
    config.objective = ConfigDict(
        {
            "name": "draft_heads",
            "target": config_dict.placeholder(str),
            "drafter": "medusa",
            "heads": {"num_heads": 4, "num_layers": 1},
            "hard": 0.0,
            "soft": 1.0,
        }
    )
    config.data = ConfigDict({"path": "data/python"})
    config.steps = 400
    config.batch_size = 16
    config.length = 256
    config.optimizer = ConfigDict(
        {
            "learning_rate": 3e-3,
            "warmup_steps": 20,
        }
    )
    config.evaluation = ConfigDict({"every": 200, "batches": 16})
    config.checkpoint = ConfigDict({"every": 100})

    if variant == "paper":
        config.objective.update(hard=1.0, soft=0.0)
        config.optimizer.update(name="adamw", learning_rate=1e-3, final_fraction=0.0)
        config.optimizer.warmup_steps = config.steps // 10
    if variant == "quickstart":
        config.optimizer.update(name="muon", learning_rate=1e-2)
        config.steps, config.batch_size = 100, 8
        config.objective.labels = "all"
        config.optimizer.warmup_steps = 5
        config.evaluation.update(every=50, batches=4)
        config.checkpoint.update(every=50, keep=1)
    if variant == "smoke":
        config.steps, config.batch_size, config.length = 20, 4, 128
        config.optimizer.warmup_steps = 2
        config.evaluation.update(every=10, batches=2)
        config.checkpoint.every = 10
        config.metrics = ConfigDict({"every": 5})
        config.objective.loop_tokens = 32
    return config
