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
    config.data = ConfigDict({"path": "data/chat"})
    config.steps = 1000
    config.batch_size = 32
    config.length = 1024
    config.optimizer = ConfigDict(
        {
            "learning_rate": 2e-5,
            "warmup_steps": 50,
        }
    )
    config.evaluation = ConfigDict({"every": 200})
    config.checkpoint = ConfigDict({"every": 200})

    if variant == "smoke":
        config.steps, config.batch_size, config.length = 10, 4, 64
        config.optimizer.warmup_steps = 2
        config.evaluation.update(every=5, batches=2)
        config.checkpoint.every = 5
        config.metrics = ConfigDict({"every": 1})
    return config
