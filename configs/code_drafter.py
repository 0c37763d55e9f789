r"""Trains the drafter of a collaborating pair: a large VAR that goes on learning the small scales alone (CoDe).

    python -m train.main --config=configs/code_drafter.py --config.objective.tokenizer=runs/vqvae/vqvae \
        --config.objective.init_from=runs/var/var --workdir=runs/drafter

Cross-entropy on the scales before `objective.scales_until`, 8 of the 10 of 256 pixels; what the others would have cost
is saved too. The code that trained the published pairs was not released: rate and length are suggestions, 5% of the
epochs of the pretraining. Expected time: hours on eight accelerators. Expected result: a VAR directory,
runs/drafter/var, for `--drafters 8=runs/drafter/var` of `eval.images.main`.

`configs/code_drafter.py:glyphs` is the drafter of `scripts/quickstart.sh images`, of 3 scales: about 1 min on two CPU
cores; `configs/code_drafter.py:emoji` that of `scripts/quickstart.sh images --emoji FILE`.

    python -m train.main --config=configs/code_drafter.py:glyphs --config.objective.tokenizer=runs/glyphs/vqvae/vqvae \
        --config.objective.init_from=runs/glyphs/var/var --workdir=runs/glyphs/drafter

`configs/code_drafter.py:smoke` takes 10 short steps with the same flags, within 1 min on two CPU cores; expect a finite
loss.
"""

from ml_collections import ConfigDict, config_dict

from configs import check_variant, var


def get_config(variant: str = "") -> ConfigDict:
    check_variant(variant, "glyphs", "emoji", "smoke")
    config = var.get_config(variant)
    del config.objective.model
    config.objective.init_from = config_dict.placeholder(str)
    config.objective.scales_until = 3 if variant else 8
    if not variant:
        config.steps = 16_700
        config.optimizer.update(learning_rate=1e-5, warmup_steps=300)
    else:
        config.optimizer.learning_rate = 5e-4
    if variant in ("glyphs", "emoji"):
        config.steps, config.optimizer.warmup_steps, config.evaluation.every = 120, 10, 60
    return config
