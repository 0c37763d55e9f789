r"""Distils a draft model: a small transformer learns to agree with its target (DistillSpec, GKD, online distillation).

    python -m train.main --config=configs/distill.py --config.objective.target=runs/lm/target \
        --config.data.path=data/continuations --workdir=runs/distill

`runs/distill/drafter` is then a drafter of chains. What is compared, and whose text is learnt from:

    --config.objective.divergence.name=reverse_kl     or forward_kl, jsd, skewed_kl, skewed_reverse_kl, tvd, tvd++, nla,
                                                      hybrid (train/objectives/divergences.py)
    --config.objective.source=student                 or dataset, teacher, mixed, served (train/objectives/distill.py)
    --config.objective.embedding=target               its table of tokens begins as the target's, projected
    --config.objective.hard=1 --config.objective.soft=0    the text's own tokens: sequence-level distillation with
                                                      source=teacher, none at all with source=dataset

Expected time: about 5 min on two CPU cores with `source=dataset`; whoever writes text takes his time on top. Expected
result: `alpha`, what verification keeps of a sampled draft, that rises with every evaluation, and a drafter directory
of about 1M parameters.

* `:smollm2`: 15M parameters for SmolLM2-135M and its own tokenizer (49,152 tokens, a tied embedding of width 256 that
  begins as the target's, projected), sized for an accelerator: 400 of its 3,000 steps took a minute on one NVIDIA H200
  beside six other jobs and ended at an alpha of 0.48, with jsd at 0.49 (docs/results.md).
* `:warm` begins from a directory, `--config.objective.init_from=DIR`, at a tenth of the rate: a small target of the
  same tokenizer (`configs/draft_model.py`), or a draft model, perhaps one for what this target was fine-tuned from. So
  do the next two.
* `:paper`: GKD as TRL has it (Agarwal et al. 2024): half of the batches the student's own at temperature 0.9, 128 new
  tokens, generalised JSD at 0.5.
* `:online`: the target serves eight prompts with the student as its drafter of five, then one update is made where
  drafts were rejected (Liu et al. 2024).
* `:smoke` takes 20 short steps on text that the student writes, within 1 min on two CPU cores for targets of up to 5M
  parameters; expect a falling loss.
"""

from ml_collections import ConfigDict, config_dict

from configs import check_variant


def get_config(variant: str = "") -> ConfigDict:
    check_variant(variant, "smoke", "smollm2", "warm", "paper", "online")
    config = ConfigDict()
    config.objective = ConfigDict(
        {
            "name": "distill",
            "target": config_dict.placeholder(str),
            "model": {
                "width": 128,
                "num_layers": 2,
                "num_heads": 4,
                "num_kv_heads": 2,
                "head_dim": 32,
                "mlp_width": 352,
                "max_position": 2048,
                "tied_embeddings": True,
            },
        }
    )
    config.data = ConfigDict({"path": "data/continuations"})
    config.steps = 800
    config.batch_size = 8
    config.length = 256
    config.optimizer = ConfigDict({"name": "muon", "learning_rate": 1e-2, "warmup_steps": 40})
    config.evaluation = ConfigDict({"every": 200, "batches": 16})
    config.checkpoint = ConfigDict({"every": 100})

    if variant == "smollm2":
        config.objective.model.update(width=256, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=64, mlp_width=704)
        config.objective.update(labels="assistant", draft=5, embedding="target")
        config.steps, config.batch_size, config.length = 3000, 16, 512
        config.optimizer.update(learning_rate=3e-3, warmup_steps=100)
        config.evaluation.update(every=500, batches=8)
        config.checkpoint.every = 500
    if variant in ("warm", "paper", "online"):
        del config.objective.model
        config.objective.init_from = config_dict.placeholder(str)
        config.optimizer.learning_rate = 1e-3
    if variant in ("paper", "online"):
        config.objective.labels = "assistant"
    if variant == "paper":
        config.objective.update(source="mixed", on_policy=0.5, sampling=0.9, new_tokens=128)
        config.objective.divergence = ConfigDict({"name": "jsd", "beta": 0.5})
        config.steps, config.batch_size, config.length = 2000, 32, 512
        config.optimizer = ConfigDict({"learning_rate": 2e-5, "warmup_steps": 60})
    if variant == "online":
        config.objective.update(source="served", sampling=0.0, new_tokens=128, draft=5)
        config.length = 512
        config.optimizer = ConfigDict({"learning_rate": 1e-4, "schedule": "constant", "final_fraction": 1.0})
    if variant == "smoke":
        config.objective.model.update(width=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16, mlp_width=64)
        config.objective.update(source="student", new_tokens=16, loop_prompts=2, loop_tokens=16)
        config.steps, config.batch_size, config.length = 20, 4, 64
        config.optimizer.warmup_steps = 2
        config.evaluation.update(every=20, batches=2)
        config.checkpoint.every = 20
    return config
