r"""Measures how fast drafters decode, interleaved with plain decoding, and how well the target predicts.

    python -m eval.main --config=configs/eval/decode.py --config.target=runs/lm/target \
        --config.drafters=none,runs/medusa/drafter,runs/hydra/drafter [--config.prompts=FILE] [--config.data=DIR]

With a data set, its documents' beginnings are the prompts unless a file of prompts is given, and perplexity and head
accuracies are measured too. Writes results.json and report.html to `--config.out`. Expected time: drafters x prompts x
repeats x new tokens over tokens/s, plus compilation, a few seconds per drafter and size of prompt; about 2 min for a
10M-parameter target, two drafters and the built-in prompts on two CPU cores. Expected result: every lossless run
identical to the baseline; the speed-ups are in docs/methods.md.

`configs/eval/decode.py:smoke` decodes two prompts once, 16 tokens each, within 1 min on two CPU cores; expect the same
files, with numbers that mean nothing. scripts/quickstart.sh runs `:chat`, the dozen everyday requests of
configs/eval/everyday.jsonl in the chat template, 72 new tokens each, about 2 min for SmolLM2-135M and three drafters;
with `--offline` it runs `:quickstart`, 24 documents, 64 new tokens each, within 1 min.
"""

from ml_collections import ConfigDict, config_dict

from configs import check_variant


def get_config(variant: str = "") -> ConfigDict:
    check_variant(variant, "smoke", "chat", "quickstart")
    config = ConfigDict()
    config.target = config_dict.placeholder(str)
    config.drafters = "none"
    config.out = "results"
    config.overwrite = False
    config.prompts = config_dict.placeholder(str)
    config.num_prompts = config_dict.placeholder(int)
    config.prompt_tokens = 64
    config.chat = False
    config.too_long = "error"
    config.max_new_tokens = 128
    config.batch = 1
    config.repeats = 3
    config.parts = True
    config.seed = 0
    config.typical = False
    config.sampling = ConfigDict({"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0})
    config.data = config_dict.placeholder(str)
    config.split = "valid"
    config.text = config_dict.placeholder(str)
    config.length = 256
    config.rows = 64
    config.samples = 2
    config.mesh = config_dict.placeholder(str)
    config.augment = config_dict.placeholder(str)
    config.augment_every = config_dict.placeholder(int)
    config.augment_lag = 0

    if variant == "quickstart":
        config.num_prompts, config.max_new_tokens, config.rows = 24, 64, 16
    if variant == "chat":
        config.prompts, config.chat = "configs/eval/everyday.jsonl", True
        # With 72 new tokens all of the file's requests need caches of one size, and so one compilation.
        config.max_new_tokens, config.repeats = 72, 2
    if variant == "smoke":
        config.num_prompts, config.max_new_tokens, config.repeats, config.samples = 2, 16, 1, 1
        config.length, config.rows = 64, 4
    return config
