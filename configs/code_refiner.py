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

from configs import check_variant, var


def get_config(variant: str = "") -> ConfigDict:
    check_variant(variant, "glyphs", "emoji", "smoke")
    config = var.get_config(variant)
    config.objective = ConfigDict(
        {
            "name": "code_refiner",
            "tokenizer": config_dict.placeholder(str),
            "teacher": config_dict.placeholder(str),
            "init_from": config_dict.placeholder(str),
            "first_scale": 8,
        }
    )
    if not variant:
        config.steps = 16_700
        config.optimizer.update(learning_rate=1e-5, warmup_steps=300)
    else:
        config.objective.update(first_scale=3, stochastic_depth=0.0)
        config.optimizer.learning_rate = 5e-4
    if variant in ("glyphs", "emoji"):
        config.steps = 400 if variant == "emoji" else 200
        config.batch_size, config.optimizer.warmup_steps, config.evaluation.every = 8, 10, 100
    return config
