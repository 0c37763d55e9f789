"""Trains Falcon's draft network (Gao et al. 2024, arXiv 2412.12639) on a frozen target, with glancing.

    python -m train.main --config=configs/falcon.py --config.objective.target=runs/lm/target --workdir=runs/falcon

A step costs the target's forward pass, the network's once without gradients, which tells what it gets wrong, and once
more forward and backward, shown some of the answers. Expected time: 200 steps of 8 x 256 tokens take about 1.5 min on
two CPU cores with stories260K as target. Expected result: a drafter directory, runs/falcon/drafter, with the paper's
static tree of 165 candidates in four passes of two tokens; `falcon_75` is its tree of two passes, and `python -m
eval.tree` fits one to a target. Of the metrics `wrong` falls, the share of tokens that the first reading missed, and
with it `shown`, the share of answers that the second one was given.

`--config.objective.glancing=off` trains without, `paper` by the paper's schedule, in place of its program's;
`--config.objective.block=3` guesses three tokens per pass, and `lstm_mode=recurrent` lets the LSTM go on from pair to
pair, which the published one does not.

The default differs from the paper in its optimizer, Muon, and in that the cross-entropy weighs as much as the distance
of features. `configs/falcon.py:paper` has the published numbers: a tenth of that cross-entropy, AdamW at 3e-5 (beta
0.9, 0.95, weight decay 0.01), 2,000 warm-up steps, falling in a line to 0 at 800,000 steps, gradients cut at 0.5 (here
their norm, there each element), dropout of 0.1 in the LSTM, rows of 2,048 tokens, one at a time.

`configs/falcon.py:smoke` takes 20 short steps, within 1 min on two CPU cores for targets of up to 10M parameters;
expect falling losses and equal `loop` and `replay` shares.
"""

from ml_collections import ConfigDict, config_dict

from configs import check_variant


def get_config(variant: str = "") -> ConfigDict:
    check_variant(variant, "paper", "smoke")
    config = ConfigDict()
    config.objective = ConfigDict(
        {
            "name": "falcon",
            "target": config_dict.placeholder(str),
            "soft": 0.9,
            "hard": 0.1,
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
        config.objective.update(soft=0.09, hard=0.01, dropout=0.1)
        config.optimizer.update(name="adamw", learning_rate=3e-5, schedule="linear", warmup_steps=2000, clip_norm=0.5)
        config.optimizer.weight_decay = 0.01
        config.optimizer.final_fraction = 0.0
        config.steps, config.batch_size, config.length = 800_000, 1, 2048
        config.evaluation.update(every=40_000, batches=64)
        config.checkpoint.every = 1000
    if variant == "smoke":
        config.steps, config.batch_size, config.length = 20, 4, 128
        config.optimizer.warmup_steps = 2
        config.evaluation.update(every=10, batches=2)
        config.checkpoint.every = 10
        config.metrics = ConfigDict({"every": 5})
        config.objective.loop_tokens = 32
    return config
