r"""Pretrains a small Llama-shaped target on source code.

    python -m scripts.build_dataset --kind source --src DIR --glob '**/*.py' --train_tokenizer 2048 \
        --valid_fraction 0.02 --out data/python
    python -m train.main --config=configs/lm.py --workdir=runs/lm

12M parameters in 16 layers, deep rather than wide, because a draft head costs less the more layers it saves. Expected
time: half an hour on two CPU cores, at the quickstart's 1.2 s per 1,024 tokens. Expected result: a target directory,
runs/lm/target, and its perplexity on held-out files in the last line.

`configs/lm.py:quickstart` is the short job of `scripts/quickstart.sh --offline`, 4 to 5 min on two CPU cores: a model
that has learnt the commonest turns of code and no more. `configs/lm.py:smoke` runs the same path on a 0.2M-parameter
model, within 1 min on two CPU cores; expect a loss that falls from about log(vocabulary size).
"""

from ml_collections import ConfigDict

from configs import check_variant


def get_config(variant: str = "") -> ConfigDict:
    check_variant(variant, "quickstart", "smoke")
    config = ConfigDict()
    config.objective = ConfigDict(
        {
            "name": "lm",
            "model": {
                "width": 256,
                "num_layers": 16,
                "num_heads": 4,
                "num_kv_heads": 2,
                "head_dim": 64,
                "mlp_width": 704,
                "max_position": 2048,
                "tied_embeddings": True,
            },
        }
    )
    config.data = ConfigDict({"path": "data/python"})
    config.steps = 400
    config.batch_size = 16
    config.length = 256
    config.optimizer = ConfigDict(
        {
            "name": "muon",
            "learning_rate": 1.5e-2,
            "warmup_steps": 40,
            "weight_decay": 0.1,
        }
    )
    config.evaluation = ConfigDict({"every": 200, "batches": 16})
    config.checkpoint = ConfigDict({"every": 100})

    if variant == "quickstart":
        config.steps, config.batch_size, config.length = 190, 4, 256
        config.optimizer.warmup_steps = 15
        config.evaluation.update(every=190, batches=32)
        config.checkpoint.update(every=50, keep=1)
    if variant == "smoke":
        config.objective.model.update(width=64, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=32, mlp_width=176)
        config.steps, config.batch_size, config.length = 40, 8, 128
        config.optimizer.warmup_steps = 4
        config.evaluation.update(every=20, batches=4)
        config.checkpoint.every = 20
    return config
