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

from ml_collections import ConfigDict

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
    config.data = ConfigDict({"path": "data/glyphs"})
    config.steps = 400
    config.batch_size = 64
    config.optimizer = ConfigDict(
        {
            "learning_rate": 3e-3,
            "warmup_steps": 20,
            "final_fraction": 0.02,
            "weight_decay": 0.05,
        }
    )
    config.evaluation = ConfigDict({"every": 200})
    config.checkpoint = ConfigDict({"every": 200, "keep": 1})
    config.metrics = ConfigDict({"every": 25})

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
