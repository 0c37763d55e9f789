"""Trains P-EAGLE's layers (arXiv 2602.01469), which guess several tokens in one pass, on a frozen target.

    python -m train.main --config=configs/p_eagle.py --config.objective.target=runs/lm/target --workdir=runs/p_eagle

A step costs the target's forward pass, the network's passes over the text, and about twice as many rows again behind
positions of the text, fewer at every depth. Expected result: a drafter directory, runs/p_eagle/drafter, that drafts a
chain in a single pass, where EAGLE-3 needs one for every token; accuracy falls faster with depth than EAGLE-3's,
because a guess does not know the ones before it. A tree instead of the chain is one flag of whoever decodes with it.

The default has 2 layers and 5 tokens and an embedding that is the target's; the draft vocabulary is the target's too,
with `--config.objective.vocabulary=8000` it is the 8,000 most frequent labels of the training split.
`configs/p_eagle.py:paper` has the numbers of the released drafter of GPT-OSS-120B as far as they are known: 4 layers, 8
tokens, of which 0.8 of the rows of a depth have another behind them but at least 0.2 of all, 32,000 draft tokens, an
embedding that is trained, AdamW at 1e-4, rows of 4,096 tokens, one at a time.

Expected time: for SmolLM2-135M 551 steps of 8 x 512 tokens, with a draft vocabulary of 8,192, took 64 s on one NVIDIA
H200, seven other heads learning beside it (docs/results.md). `configs/p_eagle.py:smoke` takes 20 short steps, within 1
min on two CPU cores for targets of up to 10M parameters; expect falling losses and equal `loop` and `replay` shares.
"""

from ml_collections import ConfigDict, config_dict

from configs import check_variant


def get_config(variant: str = "") -> ConfigDict:
    check_variant(variant, "paper", "smoke")
    config = ConfigDict()
    config.objective = ConfigDict(
        {
            "name": "p_eagle",
            "target": config_dict.placeholder(str),
            "num_layers": 2,
            "depth": 5,
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
        config.objective.update(num_layers=4, depth=8, vocabulary=32_000, own_embedding=True)
        config.optimizer.update(name="adamw", learning_rate=1e-4, warmup_steps=2000, clip_norm=0.5)
        config.optimizer.final_fraction = 0.0
        config.steps, config.batch_size, config.length = 400_000, 1, 4096
        config.evaluation.update(every=20_000, batches=64)
        config.checkpoint.every = 1000
    if variant == "smoke":
        config.steps, config.batch_size, config.length = 20, 4, 128
        config.optimizer.warmup_steps = 2
        config.evaluation.update(every=10, batches=2)
        config.checkpoint.every = 10
        config.metrics = ConfigDict({"every": 5})
        config.objective.loop_tokens = 32
    return config
