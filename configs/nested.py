r"""Pretrains a small transformer with exits, to draft for several targets of one tokenizer (S2D, Kavehzadeh 2024).

    python -m train.main --config=configs/nested.py --config.data.path=data/continuations --workdir=runs/nested
    python -m scripts.convert --from model --src runs/nested/target --base SMALL --exits 2 --out runs/nested/small
    python -m scripts.convert --from model --src runs/nested/target --base LARGE --exits 2,4 --thresholds 0.7 \
        --policy scheduled:depth=5,threshold=0.3 --out runs/nested/large

Every exit learns next tokens under the same weight (`:warm`: under its share of the layers). Targets teach exits with
--config.objective.soft=1.0 --config.objective.teachers="('SMALL','LARGE')", one directory for all or one for each.
Expected time: about 6 min on two CPU cores. Expected result: a target directory of about 1M parameters, and
an `alpha` that rises at every exit. `scripts/nested.sh` measures how near an exit comes to a network of its own.

`configs/nested.py:warm` begins from a directory, --config.objective.init_from=DIR, at a tenth of the rate: from a
target's first layers, as S2D does from 12 of Vicuna-7B's with exits after 6 and 9 (--config.objective.layers=12
--config.objective.exits="(6,9)").

`configs/nested.py:smoke` takes 40 steps on a tiny shape, within 1 min on two CPU cores; expect losses that fall.
"""

from ml_collections import ConfigDict, config_dict

from configs import check_variant, lm


def get_config(variant: str = "") -> ConfigDict:
    check_variant(variant, "warm", "smoke")
    config = lm.get_config("smoke" if variant == "smoke" else "")
    config.objective.update(name="exits", exits=(2,), weights=(1.0, 1.0))
    if variant == "smoke":
        config.objective.exits = (1,)
    elif variant == "warm":
        del config.objective.model
        config.objective.update(init_from=config_dict.placeholder(str), weights=())
        config.optimizer.learning_rate = 1.5e-3
        config.batch_size = 8
    else:
        config.objective.model.update(width=128, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=32, mlp_width=352)
        config.steps, config.batch_size = 800, 8
    return config
