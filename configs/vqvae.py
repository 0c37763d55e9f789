r"""Trains a multi-scale VQ-VAE, whose codes a VAR transformer will write.

    python -m scripts.build_dataset --images FOLDER --size 256 --valid_fraction 0.01 --out data/imagenet256
    python -m train.main --config=configs/vqvae.py --workdir=runs/vqvae

The published network, 109M parameters for 256 pixels, with the numbers of the one recipe that its authors have released
(that of a single-scale relative): 250 epochs of ImageNet at batch 768. That recipe's discriminator reads features of a
frozen DINO, with augmentation and a consistency loss, and it has dropout of 0.05 and LPIPS on VGG's features; here the
discriminator is a convolutional one of patches that learns all it knows, there is no dropout, no perceptual loss unless
asked for, and images are the centre crops of the data set. Expected time: days on eight accelerators. Expected result:
a VQ-VAE directory, runs/vqvae/vqvae. For sharper images give it Inception's features to compare:
`--config.objective.perceptual.net=inception --config.objective.perceptual.weights=FILE`.

`configs/vqvae.py:glyphs` is the tokenizer of `scripts/quickstart.sh images`: 1M parameters, about 4 min on two CPU
cores; expect readable glyphs.

    python -m scripts.build_dataset --images glyphs --max_documents 21000 --valid_documents 1000 --out data/glyphs
    python -m train.main --config=configs/vqvae.py:glyphs --workdir=runs/glyphs/vqvae

`configs/vqvae.py:emoji` is that of `scripts/quickstart.sh images --emoji FILE`, for 64x64 pixels.

    python -m scripts.build_dataset --images FILE.npz --label group --valid_documents 500 --out data/emoji

`configs/vqvae.py:smoke` runs the same path in 10 steps, within 1 min on two CPU cores; expect a loss that falls.
"""

from ml_collections import ConfigDict

from configs import check_variant


def get_config(variant: str = "") -> ConfigDict:
    check_variant(variant, "glyphs", "emoji", "smoke")
    config = ConfigDict()
    config.objective = ConfigDict(
        {
            "name": "vqvae",
            "model": {
                "vocab_size": 4096,
                "latent_channels": 32,
                "width": 160,
                "multipliers": (1, 1, 2, 2, 4),
                "blocks": 2,
                "scales": (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
                "phis": 4,
            },
            "gan": {"weight": 0.4},
        }
    )
    config.data = ConfigDict({"path": "data/imagenet256"})
    config.steps, config.batch_size = 417_000, 768
    config.optimizer = ConfigDict(
        {
            "learning_rate": 3e-4,
            "warmup_steps": 2000,
            "final_fraction": 0.3,
            "weight_decay": 5e-3,
            "b1": 0.5,
            "b2": 0.9,
            "clip_norm": 10.0,
            "ema": 0.9999,
        }
    )
    config.evaluation = ConfigDict({"every": 5000, "batches": 20})
    config.checkpoint = ConfigDict({"every": 5000})
    config.metrics = ConfigDict({"every": 50})

    if variant in ("glyphs", "emoji", "smoke"):
        config.data.path = "data/glyphs"
        config.objective.model.update(
            vocab_size=512, latent_channels=16, width=32, multipliers=(1, 2, 2), blocks=1, scales=(1, 2, 3, 4, 6, 8)
        )
        config.objective.gan.weight = 0.0
        config.objective.reset_every = 50
        config.steps, config.batch_size = 720, 16
        config.optimizer.update(learning_rate=2e-3, warmup_steps=20, final_fraction=0.05, ema=0.99)
        config.evaluation.update(every=360, batches=16)
        config.checkpoint.update(every=200, keep=1)
        config.metrics.every = 20
    if variant == "emoji":
        config.data.path = "data/emoji"
        config.objective.model.multipliers = (1, 2, 2, 2)
        config.steps = 1200
    if variant == "smoke":
        config.steps, config.batch_size = 10, 8
        config.objective.model.update(width=8, vocab_size=64)
        config.optimizer.warmup_steps = 2
        config.evaluation.update(every=10, batches=2)
        config.metrics.every = 5
    return config
