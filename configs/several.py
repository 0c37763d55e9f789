r"""Trains Hydra++, Medusa and EAGLE-3 side by side on a frozen target, whose forward runs once per step for all.

    python -m train.main --config=configs/several.py --config.objective.target=runs/lm/target --workdir=runs/several

Every member has the objective and the optimizer of its own config (`configs/hydra_pp.py`, `configs/medusa.py`,
`configs/eagle3.py`) and ends where that job would, at the same batch, steps and seed, up to rounding. Expected time:
the sum of the three jobs less two of their three forwards of the target. Expected result: three drafter directories,
runs/several/drafters/hydra_pp, runs/several/drafters/medusa and runs/several/drafters/eagle3; metrics go by the same
names. Other members: copy this file. `config.optimizer` is for members without a section `optimizer`.

With `--config.data.features=runs/features` the target's features are written there first, in bfloat16, so that no step
runs the target; other jobs on the same target, data and length may read them too.

`configs/several.py:smoke` takes 20 short steps, within 1 min on two CPU cores for targets of up to 5M parameters;
expect falling losses and equal `loop` and `replay` shares.
"""

from ml_collections import ConfigDict, config_dict

from configs import check_variant, eagle3, hydra_pp, medusa


def get_config(variant: str = "") -> ConfigDict:
    check_variant(variant, "smoke")
    jobs = {"hydra_pp": hydra_pp, "medusa": medusa, "eagle3": eagle3}
    config = medusa.get_config(variant)
    members = {}
    for name, job in jobs.items():
        own = job.get_config(variant)
        del own.objective.target
        members[name] = {"objective": own.objective, "optimizer": own.optimizer}
    config.objective = ConfigDict(
        {
            "name": "several",
            "target": config_dict.placeholder(str),
            "members": members,
        }
    )
    return config
