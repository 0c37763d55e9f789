r"""Trains the classifier whose features judge generated images, on the glyphs that need no download.

    python -m scripts.build_dataset --images glyphs --max_documents 21000 --valid_documents 1000 --out data/glyphs
    python -m train.main --config=configs/classifier.py --workdir=runs/classifier

Half a million parameters. Expected time: 1 min on two CPU cores; expected result: about 99% accuracy on held-out glyphs
of 34 classes, and runs/classifier/classifier for `python -m eval.images.main --features`. For other images set
`--config.data.path` and `--config.objective.model.image_size`.

`configs/classifier.py:emoji` is for images of 64x64 pixels.

`configs/classifier.py:smoke` runs the same path on a tiny network, within 20 s on two CPU cores; expect a loss that has
begun to fall from about log(number of classes).
"""

from ml_collections import ConfigDict, config_dict

from configs import check_variant


def get_config(variant: str = "") -> ConfigDict:
    check_variant(variant, "emoji", "smoke")
    config = ConfigDict()
    config.objective = ConfigDict(
        {
            "name": "image_classifier",
            "model": {"image_size": 32, "width": 32, "multipliers": (1, 2, 4)},
            "shift": 2,
        }
    )
    config.data = ConfigDict(
        {
            "path": "data/glyphs",
            "split": "train",
            "valid_split": "valid",
            "tokenizer": config_dict.placeholder(str),
            "fields": config_dict.placeholder(str),
        }
    )
    config.steps = 400
    config.batch_size = 64
    config.length = config_dict.placeholder(int)
    config.seed = 0
    config.optimizer = ConfigDict(
        {
            "name": "adamw",
            "learning_rate": 3e-3,
            "schedule": "cosine",
            "warmup_steps": 20,
            "final_fraction": 0.02,
            "weight_decay": 0.05,
            "b1": 0.9,
            "b2": 0.95,
            "eps": 1e-8,
            "clip_norm": 1.0,
            "ema": 0.0,
        }
    )
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})
    config.evaluation = ConfigDict({"every": 200, "batches": config_dict.placeholder(int)})
    config.checkpoint = ConfigDict({"every": 200, "keep": 1})
    config.metrics = ConfigDict({"every": 25, "tensorboard": False, "wandb": config_dict.placeholder(str)})

    if variant == "emoji":
        config.data.path = "data/emoji"
        config.objective.model.image_size = 64
    if variant == "smoke":
        config.objective.model.update(width=8, multipliers=(1, 2))
        config.steps, config.batch_size = 40, 32
        config.optimizer.warmup_steps = 4
        config.evaluation.update(every=40, batches=4)
        config.checkpoint.every = 20
    return config
