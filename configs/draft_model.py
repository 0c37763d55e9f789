"""Pretrains a small transformer to draft for a larger one of the same tokenizer (Leviathan et al. 2023).

    python -m train.main --config=configs/draft_model.py --config.data.path=data/continuations --workdir=runs/draft
    python -m scripts.convert --from model --src runs/draft/target --base runs/lm/target --policy static:tree=chain:4 \
        --out runs/draft/drafter

It learns next tokens like any target (`configs/lm.py`), best on text that the target itself wrote
(`scripts/continue_dataset.py`), and the second command makes it a drafter. Expected time: about 4 min on two CPU cores.
Expected result: a target directory of about 1M parameters, and as a drafter of chains an acceptance length near that of
draft heads.

`configs/draft_model.py:smoke` takes 40 steps on a tiny shape, within 1 min on two CPU cores; expect a falling loss.
"""

from ml_collections import ConfigDict

from configs import check_variant, lm


def get_config(variant: str = "") -> ConfigDict:
    check_variant(variant, "smoke")
    config = lm.get_config(variant)
    if variant != "smoke":
        config.objective.model.update(width=128, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=32, mlp_width=352)
        config.steps, config.batch_size = 800, 8
    return config
