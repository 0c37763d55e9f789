r"""Trains a lens by which a target's own first layers draft for it, and the target stays as it is (Tuned Lens, 2023).

    python -m train.main --config=configs/early_exit.py --config.objective.target=TARGET \
        --config.data.path=data/continuations --workdir=runs/early_exit
    python -m scripts.generate --target TARGET --drafter runs/early_exit/drafter --prompt TEXT

What is learnt is an affine map of width^2 numbers, from the target's own distribution. A target that was itself trained
to leave early needs none (`configs/layer_skip.py`). Expected time: that of the target's forward pass over the data, a
few minutes for SmolLM2-135M on one accelerator. Expected result: a drafter directory, runs/early_exit/drafter, to
compare with --drafter early_exit:LAYERS, which looks through no lens (`scripts/nested.sh` does).

`configs/early_exit.py:smoke` takes 10 short steps with an exit after 1 layer, within 1 min on two CPU cores for targets
of up to 10M parameters.
"""

from ml_collections import ConfigDict, config_dict

from configs import check_variant


def get_config(variant: str = "") -> ConfigDict:
    check_variant(variant, "smoke")
    config = ConfigDict()
    config.objective = ConfigDict({"name": "early_exit", "target": config_dict.placeholder(str), "layers": 4})
    config.data = ConfigDict({"path": "data/continuations"})
    config.steps = 400
    config.batch_size = 16
    config.length = 256
    config.optimizer = ConfigDict({"name": "muon", "learning_rate": 1e-2, "warmup_steps": 20})
    config.evaluation = ConfigDict({"every": 200, "batches": 8})
    config.checkpoint = ConfigDict({"every": 200})

    if variant == "smoke":
        config.objective.update(layers=1, loop_prompts=2, loop_tokens=16)
        config.steps, config.batch_size, config.length = 10, 4, 64
        config.optimizer.warmup_steps = 2
        config.evaluation.update(every=5, batches=2)
        config.checkpoint.every = 5
        config.metrics = ConfigDict({"every": 1})
    return config
