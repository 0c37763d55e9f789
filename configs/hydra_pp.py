"""Trains Hydra++ heads (Ankner et al. 2024, section 4) on a frozen target.

    python -m train.main --config=configs/hydra_pp.py --config.objective.target=runs/lm/target --workdir=runs/hydra_pp

Four blocks per head, one transformer block over the target's features, and the target's own distribution as the only
teacher. Expected time: about twice Hydra's. Expected result: a drafter directory, runs/hydra_pp/drafter. Trained on
stories260K it has acceptance lengths of 2.84 to 3.82 at 8 to 64 candidates, Hydra of 2.50 to 3.38 (docs/results.md);
in the paper it commits 3.7 tokens per step where Hydra commits 3.0 (Vicuna-7B, MT-Bench).

`configs/hydra_pp.py:smoke` takes 20 short steps, within 1 min on two CPU cores for targets of up to 10M parameters;
expect falling losses and equal `loop` and `replay` shares.
"""

from ml_collections import ConfigDict, config_dict

from configs import check_variant


def get_config(variant: str = "") -> ConfigDict:
    check_variant(variant, "smoke")
    config = ConfigDict()
    config.objective = ConfigDict(
        {
            "name": "draft_heads",
            "target": config_dict.placeholder(str),
            "drafter": "hydra",
            "heads": {"num_heads": 4, "num_layers": 4, "prefix": True, "dropout": 0.2},
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
            "learning_rate": 5e-4,
            "warmup_steps": 20,
            "final_fraction": 0.33,
            "weight_decay": 0.1,
        }
    )
    config.evaluation = ConfigDict({"every": 200, "batches": 16})
    config.checkpoint = ConfigDict({"every": 100})

    if variant == "smoke":
        config.steps, config.batch_size, config.length = 20, 4, 128
        config.optimizer.warmup_steps = 2
        config.evaluation.update(every=10, batches=2)
        config.checkpoint.every = 10
        config.metrics = ConfigDict({"every": 5})
        config.objective.loop_tokens = 32
    return config
