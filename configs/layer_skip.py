r"""Goes on training a target so that its own first layers draft for it (LayerSkip, Elhoushi et al. 2024, without its
dropout of layers).

    python -m train.main --config=configs/layer_skip.py --config.objective.init_from=TARGET \
        --config.data.path=data/continuations --workdir=runs/layer_skip
    python -m scripts.generate --target runs/layer_skip/target --drafter early_exit:4 --prompt TEXT

The target as it was teaches all exits, each by the forward KL divergence and with its share of the layers as weight: so
the end of the stack, which has most weight and nothing to learn at first, keeps its text while the exits learn to
foresee it. What comes out is another target, though a close one; `agreement` at its last exit, in the evaluations,
says how close. Expected time: that of two forward passes and a backward one over the data. Expected result: an
`alpha` of the exit that rises. `scripts/nested.sh` measures acceptance beside that of the target that it was.

`configs/layer_skip.py:smoke` takes 10 short steps with an exit after 1 layer, within 1 min on two CPU cores for targets
of up to 10M parameters.
"""

from ml_collections import ConfigDict, config_dict

from configs import check_variant


def get_config(variant: str = "") -> ConfigDict:
    check_variant(variant, "smoke")
    config = ConfigDict()
    config.objective = ConfigDict(
        {
            "name": "exits",
            "init_from": config_dict.placeholder(str),
            "exits": (4, 8),
            "hard": 0.0,
            "soft": 1.0,
            "teachers": ("init_from",),
        }
    )
    config.data = ConfigDict({"path": "data/continuations"})
    config.steps = 600
    config.batch_size = 16
    config.length = 256
    config.optimizer = ConfigDict({"learning_rate": 3e-4, "warmup_steps": 30})
    config.evaluation = ConfigDict({"every": 200, "batches": 8})
    config.checkpoint = ConfigDict({"every": 200})

    if variant == "smoke":
        config.objective.exits = (1,)
        config.steps, config.batch_size, config.length = 10, 4, 64
        config.optimizer.warmup_steps = 2
        config.evaluation.update(every=5, batches=2)
        config.checkpoint.every = 5
        config.metrics = ConfigDict({"every": 1})
    return config
