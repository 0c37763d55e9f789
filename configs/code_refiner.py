r"""Trains the refiner of a collaborating pair: a small VAR that learns the large scales from a large one (CoDe).

    python -m train.main --config=configs/code_refiner.py --config.objective.tokenizer=runs/vqvae/vqvae \
        --config.objective.teacher=runs/var_d30/var --config.objective.init_from=runs/var_d16/var --workdir=runs/refiner

From VAR-d16 under VAR-d30, scales 8 and 9 of 256 pixels. The code that trained the published pairs was not released:
rate and length are suggestions, 5% of the epochs of the pretraining. Expected time: hours on eight accelerators.
Expected result: a VAR directory, runs/refiner/refiner, closer to the teacher (`divergence`) than the small model was.

`configs/code_refiner.py:glyphs` is the refiner of `scripts/quickstart.sh images`, from the small model under the large
one: about 1 min on two CPU cores; `configs/code_refiner.py:emoji` that of `scripts/quickstart.sh images --emoji FILE`.

    python -m train.main --config=configs/code_refiner.py:glyphs \
        --config.objective.tokenizer=runs/glyphs/vqvae/vqvae --config.objective.teacher=runs/glyphs/var/var \
        --config.objective.init_from=runs/glyphs/var_small/var --workdir=runs/glyphs/refiner

`configs/code_refiner.py:smoke` takes 10 short steps with the same flags, within 1 min on two CPU cores; expect a finite
loss.
"""

from ml_collections import ConfigDict, config_dict

from configs import check_variant


def get_config(variant: str = "") -> ConfigDict:
    check_variant(variant, "glyphs", "emoji", "smoke")
    config = ConfigDict()
    config.objective = ConfigDict(
        {
            "name": "code_refiner",
            "tokenizer": config_dict.placeholder(str),
            "teacher": config_dict.placeholder(str),
            "init_from": config_dict.placeholder(str),
            "first_scale": 8,
            "temperature": 1.0,
            "alpha": 0.5,
            "class_dropout": 0.1,
            "stochastic_depth": config_dict.placeholder(float),
        }
    )
    config.data = ConfigDict(
        {
            "path": "data/imagenet256",
            "split": "train",
            "valid_split": "valid",
            "tokenizer": config_dict.placeholder(str),
            "fields": config_dict.placeholder(str),
        }
    )
    config.steps = 16_700
    config.batch_size = 768
    config.length = config_dict.placeholder(int)
    config.seed = 0
    config.optimizer = ConfigDict(
        {
            "name": "adamw",
            "learning_rate": 1e-5,
            "schedule": "linear",
            "warmup_steps": 300,
            "final_fraction": 0.1,
            "weight_decay": 0.05,
            "b1": 0.9,
            "b2": 0.95,
            "eps": 1e-8,
            "clip_norm": 2.0,
            "ema": 0.0,
        }
    )
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})
    config.evaluation = ConfigDict({"every": 5000, "batches": 20})
    config.checkpoint = ConfigDict({"every": 5000, "keep": 2})
    config.metrics = ConfigDict({"every": 50, "tensorboard": False, "wandb": config_dict.placeholder(str)})

    if variant in ("glyphs", "emoji", "smoke"):
        config.data.path = "data/glyphs"
        config.objective.first_scale = 3
        config.objective.stochastic_depth = 0.0
        config.steps, config.batch_size = 200, 8
        config.optimizer.update(learning_rate=5e-4, schedule="cosine", warmup_steps=10, final_fraction=0.05)
        config.evaluation.update(every=100, batches=16)
        config.checkpoint.update(every=100, keep=1)
        config.metrics.every = 20
    if variant == "emoji":
        config.data.path = "data/emoji"
        config.steps = 400
    if variant == "smoke":
        config.steps, config.batch_size = 10, 4
        config.optimizer.warmup_steps = 2
        config.evaluation.update(every=10, batches=2)
        config.metrics.every = 5
    return config
