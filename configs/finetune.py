r"""Goes on training a target: on a chat data set, the assistant's tokens alone.

    python -m scripts.build_dataset --kind chat --src chats.jsonl --valid_fraction 0.02 \
        --tokenizer TARGET --out data/chat
    python -m train.main --config=configs/finetune.py --config.objective.init_from=TARGET --workdir=runs/finetune

Expected time: that of one forward and backward pass over the data, 3 epochs of a few thousand dialogues in about 1 h
for a 100M-parameter target on one accelerator. Expected result: a target directory, runs/finetune/target.

`configs/finetune.py:smoke` takes 10 short steps, within 1 min on two CPU cores for targets of up to 10M parameters.
"""

from ml_collections import ConfigDict, config_dict

from configs import check_variant


def get_config(variant: str = "") -> ConfigDict:
    check_variant(variant, "smoke")
    config = ConfigDict()
    config.objective = ConfigDict({"name": "lm", "labels": "assistant", "init_from": config_dict.placeholder(str)})
    config.data = ConfigDict(
        {
            "path": "data/chat",
            "split": "train",
            "valid_split": "valid",
            "tokenizer": config_dict.placeholder(str),
            "fields": config_dict.placeholder(str),
        }
    )
    config.steps = 1000
    config.batch_size = 32
    config.length = 1024
    config.seed = 0
    config.optimizer = ConfigDict(
        {
            "name": "adamw",
            "learning_rate": 2e-5,
            "schedule": "cosine",
            "warmup_steps": 50,
            "final_fraction": 0.1,
            "weight_decay": 0.0,
            "b1": 0.9,
            "b2": 0.95,
            "eps": 1e-8,
            "clip_norm": 1.0,
            "ema": 0.0,
        }
    )
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})
    config.evaluation = ConfigDict({"every": 200, "batches": config_dict.placeholder(int)})
    config.checkpoint = ConfigDict({"every": 200, "keep": 2})
    config.metrics = ConfigDict({"every": 10, "tensorboard": False, "wandb": config_dict.placeholder(str)})

    if variant == "smoke":
        config.steps, config.batch_size, config.length = 10, 4, 64
        config.optimizer.warmup_steps = 2
        config.evaluation.update(every=5, batches=2)
        config.checkpoint.every = 5
        config.metrics.every = 1
    return config
