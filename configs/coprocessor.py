r"""Trains a coprocessor on a frozen target: latents, made from its KV cache, that better what it says next
(arXiv 2412.17747).

    python -m train.main --config=configs/coprocessor.py --config.objective.target=runs/lm/target \
        --workdir=runs/coprocessor

With S tokens to a row, M places, N latents and A tokens ahead of each, a step costs about as much as S + 3 M N +
2 M (N + A - 1) tokens forward, where an ordinary step costs 3 S: by count 1.8 times one with the numbers of this file
(measured: 1.4, docs/methods.md). Expected time: 1 to 2 h on two CPU cores for a 3M-parameter target, an estimate.
Expected result: a coprocessor directory, runs/coprocessor/coprocessor. The loss comes down from far above the target's
own, and `valid/change_1` to `valid/change_16`, by how many percent perplexity is above the target's at every offset,
fall. Measured here, `:bytes` with rates that end at a tenth, on held-out files: 5.3, 1.5, 1.3 and 0.8% at offsets 1 to
4; with `positions=hold` and `z_scale=match_rms` of `objective.coprocessor`, which learns much faster, -0.6, -0.3, 0.0
and -0.1% (docs/results.md), and on the offline quickstart's target in 400 steps, with `z_base=last_token` too, -1.1,
-0.8, -1.6 and -1.6%, where pause tokens reach as much. `scripts/coprocessor.sh` compares kinds and numbers of latents.
Gemma-2 2B as published, 100,000 steps of 2M tokens, has -1.5% at offset 1 and -1.2% at offset 8 with 8 latents, -3.9%
and -2.6% with 64.

Kinds: `full` is a copy of the target; `configs/coprocessor.py:lora` shares its weights and learns low-rank adapters
beside them; with `--config.objective.coprocessor.kind=` also `scratch`, and the two baselines, `pause` and `soft`,
whose soft tokens alone are learnt. `configs/coprocessor.py:paper` has the published sizes: 64 latents, 128 places of 16
tokens in rows of 2,048; rates and schedule were not published.

`configs/coprocessor.py:bytes` is for a small target over bytes: 17 min on one CPU core for one of 0.3M parameters, with
4 latents (0.25 s a step, beside other work).
`configs/coprocessor.py:smollm2` is `lora` for SmolLM2-135M-Instruct, on one accelerator:

    python -m scripts.fetch_smollm2 --out runs/smollm2
    python -m scripts.continue_dataset --target runs/smollm2 --out data/chats --documents 20000 --temperature 0,0.7
    bash scripts/coprocessor.sh --config smollm2 --labels assistant --target runs/smollm2 --data data/chats \
        --length 512 --main lora --latents 4,8,16 --kinds pause,soft --kinds_at 16 --out runs/coprocessor_smollm2

of which each training is `train.main --config=configs/coprocessor.py:smollm2 --config.objective.target=runs/smollm2
--config.data.path=data/chats --workdir=DIR`. Expected time: an hour on an H100 for all, an estimate. Of chats the
answers are learnt: what a template puts before all of them is soon known by heart, and a chat's target says it badly.
Expected result: on WikiText, in small (`--labels all --rate 1e-3 --steps 250 --batch 4 --length 128 --places 8 --ahead
8`), 4 latents 15 to 39% below the target's perplexity, and pause tokens 35 to 52% (docs/results.md).

`configs/coprocessor.py:smoke` takes 20 short steps, within 1 min on two CPU cores for targets of up to 10M parameters;
expect a falling loss.
"""

from ml_collections import ConfigDict, config_dict

from configs import check_variant


def get_config(variant: str = "") -> ConfigDict:
    check_variant(variant, "lora", "paper", "bytes", "smollm2", "smoke")
    config = ConfigDict()
    config.objective = ConfigDict(
        {
            "name": "coprocessor",
            "target": config_dict.placeholder(str),
            "coprocessor": {},
            "places": 16,
            "soft": {"learning_rate": 1e-3, "warmup_steps": 20},
        }
    )
    config.data = ConfigDict({"path": "data/python"})
    config.steps = 2000
    config.batch_size = 16
    config.length = 256
    config.optimizer = ConfigDict({"learning_rate": 3e-4, "warmup_steps": 20})
    config.evaluation = ConfigDict({"every": 500, "batches": 16})
    config.checkpoint = ConfigDict({"every": 500})

    if variant in ("lora", "smollm2"):
        config.objective.coprocessor.kind = "lora"
        config.optimizer.learning_rate = 1e-3
    if variant == "paper":
        config.objective.coprocessor.num_latents = 64
        config.objective.places = 128
        config.steps, config.batch_size, config.length = 100_000, 1024, 2048
        config.optimizer.update(learning_rate=5e-5, warmup_steps=1000)
        config.objective.soft.warmup_steps = 1000
        config.evaluation.every, config.checkpoint.every = 5000, 1000
        config.remat = "layers"
    if variant == "bytes":
        config.objective.coprocessor.num_latents = 4
        config.objective.ahead = 8
        config.length, config.steps = 128, 4000
        config.optimizer.update(learning_rate=1.5e-3, final_fraction=0.0)
        config.objective.soft.update(learning_rate=1e-2, final_fraction=0.0)
    if variant == "smollm2":
        # With these latents begin near the target instead of far above it (docs/decisions.md).
        config.objective.coprocessor.update(
            num_latents=16, positions="hold", z_scale="match_rms", z_base="last_token", z_tap="pre_norm"
        )
        del config.objective.places
        config.objective.labels = "assistant"
        config.length, config.steps, config.remat = 512, 3000, "products"
        config.optimizer.update(learning_rate=5e-4, warmup_steps=50)
        config.objective.soft.learning_rate = 1e-2
    if variant == "smoke":
        config.steps, config.batch_size, config.length = 20, 4, 128
        config.objective.update(places=8, ahead=4)
        config.objective.coprocessor.num_latents = 4
        config.optimizer.warmup_steps = config.objective.soft.warmup_steps = 2
        config.evaluation.update(every=10, batches=2)
        config.checkpoint.every = 10
        config.metrics = ConfigDict({"every": 5})
    return config
