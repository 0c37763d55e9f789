"""Trains JetSpec (arXiv 2606.18394) on a frozen target: DFlash's network, causal in its block, on the target's words.

    python -m train.main --config=configs/jetspec.py --config.objective.target=runs/lm/target --workdir=runs/jetspec

The loss is the forward KL divergence from the target's distribution, all slots alike, and wants text that the target
wrote itself (docs/commands.md). A step costs what DFlash's does. Expected result: a drafter directory,
runs/jetspec/drafter; `--policy accum_logp:depth=7,total=64` decodes with JetSpec's tree, and `--policy
slots:depth=7,total=64` with the best of that size.

The default differs from the paper in its size (3 layers of the target's width, blocks of 8, 64 blocks per row) and its
optimizer, Muon. `configs/jetspec.py:paper` has the published numbers: 5 layers, blocks of 16, 512 blocks per row of
3,072 tokens, AdamW at 3e-4 (beta 0.9, 0.95) falling to a tenth, 4% of the steps for warm-up, gradients cut at 1.

Expected time: for SmolLM2-135M 551 steps of 8 x 512 tokens, with a draft vocabulary of 8,192 and 128 blocks per row,
took 101 s on one NVIDIA H200, seven other heads learning beside it (docs/results.md). `configs/jetspec.py:smoke` takes
20 short steps, within 1 min on two CPU cores for targets of up to 10M parameters; expect falling losses and equal
`loop` and `replay` shares.
"""

from ml_collections import ConfigDict, config_dict

from configs import check_variant, dflash


def get_config(variant: str = "") -> ConfigDict:
    check_variant(variant, "paper", "smoke")
    config = dflash.get_config(variant)
    config.objective = ConfigDict(
        {
            "name": "dflash",
            "target": config_dict.placeholder(str),
            "num_layers": 3,
            "block": 8,
            "causal": True,
            "terms": {"forward_kl": 1.0},
            "anchors": 64,
        }
    )
    if variant == "paper":
        config.objective.update(num_layers=5, block=16, anchors=512)
        config.optimizer.update(learning_rate=3e-4, b2=0.95, final_fraction=0.1)
    if variant == "smoke":
        config.objective.update(num_layers=1, block=4, anchors=16, loop_tokens=32)
    return config
