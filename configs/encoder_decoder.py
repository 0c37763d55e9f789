r"""Trains an encoder-decoder: prompts are read once, in both directions, and answers written by a shallow decoder.

    python -m scripts.build_dataset --kind chat --src chats.jsonl --valid_fraction 0.02 \
        --tokenizer TARGET --out data/chat
    python -m train.main --config=configs/encoder_decoder.py --workdir=runs/encoder_decoder

learns the assistant's answers of a chat data set. With a decoder of the same tokenizer as its teacher, as Return of the
Encoder has it (Elfeki et al. 2025): 0.9 of the divergence from it, on answers that the student draws at temperature
0.9 from the 128 likeliest tokens, and 0.1 of cross-entropy with the data set's:

    python -m train.main --config=configs/encoder_decoder.py:distill --config.objective.target=TARGET \
        --workdir=runs/encoder_decoder

begins from random parameters. The published recipe, `:paper`, begins from a trained student
(`--config.objective.init_from=DIR`; the published one has 20 layers of encoder and 10 of decoder, of width 1,024) and
has its own optimizer: AdamW at 1e-4, weight decay 0.01, batches of 128, prompts of 1,024 tokens and answers of 256. The
paper's dropout of 0.1 is left out.

`runs/encoder_decoder/target` is a target directory: whatever decodes takes it, and prompts go to its encoder. The
published split is two layers of encoder for one of decoder, with a narrow attention and an MLP without a gate.

Expected time: 25 min on two CPU cores for the 5M parameters here besides the embedding, on SmolLM2's tokens. Expected
result: a perplexity on held-out answers that falls with every evaluation; of `:distill` also an `alpha` that rises.
`configs/encoder_decoder.py:smoke` takes 20 short steps of a 0.1M-parameter model, within 1 min on two CPU cores; expect
a falling loss.
"""

from ml_collections import ConfigDict, config_dict

from configs import check_variant


def get_config(variant: str = "") -> ConfigDict:
    check_variant(variant, "distill", "paper", "smoke")
    config = ConfigDict()
    config.objective = ConfigDict(
        {
            "name": "encoder_decoder",
            "source_length": 256,
            "model": {
                "width": 256,
                "encoder_layers": 6,
                "num_layers": 3,
                "num_heads": 4,
                "num_kv_heads": 2,
                "head_dim": 32,
                "mlp_width": 1024,
                "max_position": 2048,
                "tied_embeddings": True,
                "qkv_bias": True,
                "output_bias": True,
                "activation": "gelu_tanh",
                "gated_mlp": False,
                "mlp_bias": True,
                "norm_eps": 1e-6,
            },
        }
    )
    config.data = ConfigDict({"path": "data/chat"})
    config.steps = 1000
    config.batch_size = 16
    config.length = 128
    config.optimizer = ConfigDict({"name": "muon", "learning_rate": 1e-2, "warmup_steps": 50})
    config.evaluation = ConfigDict({"every": 250, "batches": 16})
    config.checkpoint = ConfigDict({"every": 250})

    if variant in ("distill", "paper"):
        config.objective.update(target=config_dict.placeholder(str), soft=0.9, hard=0.1, source="student")
    if variant == "paper":
        del config.objective.model
        config.objective.update(source_length=1024, init_from=config_dict.placeholder(str))
        config.batch_size, config.length = 128, 257
        config.optimizer = ConfigDict({"learning_rate": 1e-4, "warmup_steps": 50, "weight_decay": 0.01})
    if variant == "smoke":
        config.objective.model.update(width=32, encoder_layers=2, num_layers=1, num_heads=2, num_kv_heads=1)
        config.objective.model.update(head_dim=16, mlp_width=64)
        config.steps, config.batch_size = 20, 4
        config.optimizer.warmup_steps = 2
        config.evaluation.update(every=20, batches=2)
        config.checkpoint.every = 20
    return config
