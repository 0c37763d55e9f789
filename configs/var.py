r"""Trains a VAR transformer over the codes of a VQ-VAE, conditional on the class.

    python -m train.main --config=configs/var.py --config.objective.tokenizer=runs/vqvae/vqvae --workdir=runs/var

The shape and, all but exactly, the recipe of the published VAR-d16: 310M parameters, 200 epochs of ImageNet at batch
768. The published run warms up from 0.005 of the rate, holds it for 5% of the run and then lets it fall, crops images
at random out of 1.125 times their size, and computes in float16; here the rate starts near 0 and falls right after the
warm-up, images are the centre crops of the data set, and numbers are float32. Expected time: days on eight
accelerators. Expected result: a VAR directory, runs/var/var. Deeper ones are 64 x depth wide with as many heads as
layers, and begin with smaller gates (`--config.objective.gate`, 1e-5 for depth 30).

`configs/var.py:glyphs` is the larger model of `scripts/quickstart.sh images`, after `configs/vqvae.py:glyphs`, and with
other sizes the smaller one: 4.2M and 0.6M parameters, about 4 and 1 min on two CPU cores. `configs/var.py:emoji` is
that of `scripts/quickstart.sh images --emoji FILE`.

    python -m train.main --config=configs/var.py:glyphs --config.objective.tokenizer=runs/glyphs/vqvae/vqvae \
        --workdir=runs/glyphs/var

`configs/var.py:smoke` runs the same path in 10 steps, within 1 min on two CPU cores; expect a loss that falls from
about log(vocabulary size).
"""

from ml_collections import ConfigDict, config_dict

from configs import check_variant


def get_config(variant: str = "") -> ConfigDict:
    check_variant(variant, "glyphs", "emoji", "smoke")
    config = ConfigDict()
    config.objective = ConfigDict(
        {
            "name": "var",
            "tokenizer": config_dict.placeholder(str),
            "model": {"depth": 16, "width": 1024, "num_heads": 16, "shared_modulation": False, "mlp_ratio": 4},
        }
    )
    config.data = ConfigDict({"path": "data/imagenet256"})
    config.steps = 334_000
    config.batch_size = 768
    config.optimizer = ConfigDict(
        {
            "learning_rate": 3e-4,
            "schedule": "linear",
            "warmup_steps": 6700,
            "weight_decay": 0.05,
            "clip_norm": 2.0,
        }
    )
    config.evaluation = ConfigDict({"every": 5000, "batches": 20})
    config.checkpoint = ConfigDict({"every": 5000})
    config.metrics = ConfigDict({"every": 50})

    if variant in ("glyphs", "emoji", "smoke"):
        config.data.path = "data/glyphs"
        config.objective.model.update(depth=6, width=192, num_heads=6)
        config.objective.stochastic_depth = 0.0
        config.steps, config.batch_size = 600, 16
        config.optimizer.update(learning_rate=2e-3, schedule="cosine", warmup_steps=20, final_fraction=0.05)
        config.evaluation.update(every=300, batches=16)
        config.checkpoint.update(every=100, keep=1)
        config.metrics.every = 20
    if variant == "emoji":
        config.data.path = "data/emoji"
        config.steps = 800
    if variant == "smoke":
        config.objective.model.update(depth=2, width=32, num_heads=2)
        config.steps, config.batch_size = 10, 4
        config.optimizer.warmup_steps = 2
        config.evaluation.update(every=10, batches=2)
        config.metrics.every = 5
    return config
