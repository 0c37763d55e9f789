r"""Distils draft models by several divergences side by side, from one beginning and on one text.

    python -m train.main --config=configs/divergences.py --config.objective.target=runs/lm/target \
        --config.data.path=data/continuations --workdir=runs/divergences

Every member is a job of `configs/distill.py` on the data set's text, and ends where that job would, up to rounding; the
target's forward runs once for all. `undistilled` learns the text itself. Names behind a `+` choose others:
`configs/divergences.py:warm+undistilled,tvd,nla` (train/objectives/divergences.py has them). Acceptance is measured
afterwards (`eval.acceptance`, or all of it by `scripts/distill.sh`).

Expected time: five times that of `configs/distill.py`, less four of its five forwards of the target. Expected result: a
drafter directory of each in runs/divergences/drafters, and an `alpha` of each that rises with every evaluation.

* `:warm` begins from a directory, `--config.objective.members.undistilled.objective.init_from=DIR`, at a tenth of the
  rate; what one member begins from all do, and so it is with `labels` and `embedding`. On text that the target wrote
  (`scripts.continue_dataset`) with `labels=assistant`, `undistilled` is sequence-level distillation.
* `:smollm2` is `configs/distill.py:smollm2` with each of the divergences.
* `:smoke` takes 20 short steps, within 1 min on two CPU cores for targets of up to 5M parameters; expect falling
  losses.
"""

from ml_collections import ConfigDict, config_dict

from configs import check_variant, distill

TEXT = "undistilled"
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "tvd")


def get_config(variant: str = "") -> ConfigDict:
    kind, _, names = variant.partition("+")
    check_variant(kind, "smoke", "warm", "smollm2")
    config = distill.get_config(kind)
    # References: a command line that changes them for one member changes them for all.
    own = {"name": "distill", "loop_prompts": 0}
    own["labels"] = config_dict.FieldReference(config.objective.get("labels", "all"))
    if kind == "warm":
        own["init_from"] = config_dict.placeholder(str)
    else:
        own["model"] = config.objective.model.to_dict()
        own["embedding"] = config_dict.FieldReference(config.objective.get("embedding", "random"))
    if "draft" in config.objective:
        own["draft"] = config.objective.draft
    members = {}
    for name in names.split(",") if names else (TEXT, *DIVERGENCES):
        learnt = {"hard": 1.0, "soft": 0.0} if name == TEXT else {"divergence": {"name": name}}
        members[name] = {"objective": {**own, **learnt}}
    config.objective = ConfigDict({"name": "several", "target": config_dict.placeholder(str), "members": members})
    return config
