r"""Distils a draft model by MiniLLM's policy gradient on reverse KL (Gu et al. 2024).

    python -m train.main --config=configs/minillm.py --config.objective.target=runs/lm/target \
        --config.objective.init_from=runs/draft/target --config.data.path=data/continuations --workdir=runs/minillm

It begins from a student that was fine-tuned (`configs/draft_model.py`, or `configs/distill.py`). Every four steps the
student writes a batch, mixed with a fifth of its teacher, and all four learn from it. Expected time: about 10 min on
two CPU cores for a student of 1M parameters and a target of 12M. Expected result: a lower `loss` (reverse KL on
held-out text) than it began with, and a drafter directory, runs/minillm/drafter.

`configs/minillm.py:paper` has GPT-2's numbers: AdamW at 5e-6, constant, batches of 256, rows of 512 tokens, 5,000
steps. `configs/minillm.py:smoke` takes 20 short steps from a random student, within 1 min on two CPU cores for targets
of up to 5M parameters; expect a falling loss.
"""

from ml_collections import ConfigDict, config_dict

from configs import check_variant, distill


def get_config(variant: str = "") -> ConfigDict:
    check_variant(variant, "smoke", "paper")
    config = distill.get_config("smoke" if variant == "smoke" else "")
    shape = config.objective.model
    config.objective = ConfigDict(
        {
            "name": "minillm",
            "target": config_dict.placeholder(str),
            "init_from": config_dict.placeholder(str),
        }
    )
    config.steps = 400
    config.optimizer = ConfigDict(
        {"learning_rate": 1e-4, "warmup_steps": 20, "schedule": "constant", "final_fraction": 1.0}
    )
    if variant == "paper":
        config.objective.update(labels="assistant", new_tokens=256)
        config.steps, config.batch_size, config.length = 5000, 256, 512
        config.optimizer.update(learning_rate=5e-6, warmup_steps=0)
    if variant == "smoke":
        del config.objective.init_from
        config.objective.model = shape
        config.objective.update(new_tokens=16, loop_prompts=2, loop_tokens=16)
        config.steps, config.optimizer.warmup_steps, config.optimizer.learning_rate = 20, 2, 1e-2
    return config
