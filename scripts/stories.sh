#!/usr/bin/env bash
# Acceptance length on real weights: stories260K (llama2.c, 260 thousand parameters, TinyStories) as target, every kind
# of drafter trained on what it writes, all compared at equal budgets in one table.
#
#   bash scripts/stories.sh --checkpoint stories260K.bin --tokenizer tok512.bin --train train.txt --valid valid.txt
#       [--out DIR] [--fresh]
#
# The first two files are llama2.c's; the others hold TinyStories, parted by lines <|endoftext|>. An hour to two on two
# CPU cores. Every line that starts with $ is a command of its own. Asking again reuses what is finished and continues what
# was interrupted; --fresh starts over. See scripts/_venv.sh for TANDEM_VENV.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_job.sh"

job_options 'bash scripts/stories.sh --checkpoint FILE --tokenizer FILE --train FILE --valid FILE [--out DIR] [--fresh]' \
    "$@"
out=${out:-$ROOT/runs/stories}
job_begin .tandem-stories target data continuations medusa hydra hydra_pp eagle eagle3 falcon dflash jetspec dspark small \
    draft_model results

if [ ! -d "$out/target" ]; then
    run scripts.convert --from llama2c --src "$checkpoint" --tokenizer "$tokenizer" --out "$out/target"
fi
if [ ! -d "$out/data" ]; then
    run scripts.build_dataset --kind text --src "$train" --valid_src "$valid" \
        --tokenizer "$out/target" --out "$out/data"
fi
# Drafters learn to say what the target says; sampled at temperature 1 its texts serve greedy and sampled decoding.
if [ ! -d "$out/continuations" ]; then
    run scripts.continue_dataset --target "$out/target" --data "$out/data" --out "$out/continuations" \
        --documents 3072 --valid_documents 128 --prompt_tokens 32 --new_tokens 224 --temperature 1 --rows 64
fi

# All learn from the same text for as many steps, under the same optimizer.
learn=(--config.data.path="$out/continuations" --config.steps=600 --config.optimizer.name=muon
    --config.optimizer.learning_rate=1e-2 --config.optimizer.weight_decay=0.0 --config.optimizer.final_fraction=0.1)
for drafter in medusa hydra hydra_pp eagle eagle3 falcon dflash jetspec dspark; do
    case $drafter in
    hydra_pp) extra=--config.objective.heads.dropout=0.0 ;;  # It is for more passes over a text than the four here.
    eagle3) extra=--config.batch_size=8 ;;                   # Its step unrolls five steps of drafting.
    *) extra="" ;;
    esac
    run train.main --config=configs/$drafter.py --config.objective.target="$out/target" "${learn[@]}" $extra \
        --workdir="$out/$drafter"
done
shape=--config.objective.model
run train.main --config=configs/draft_model.py "${learn[@]}" --config.batch_size=16 $shape.width=32 $shape.head_dim=8 \
    $shape.mlp_width=88 $shape.max_position=512 --workdir="$out/small"
if [ ! -d "$out/draft_model" ]; then
    run scripts.convert --from model --src "$out/small/target" --base "$out/target" --policy static:tree=chain:4 \
        --out "$out/draft_model"
fi
job_finished comparison
small=$out/draft_model
run eval.acceptance --target "$out/target" --data "$out/data" --out "$out/results" --methods \
    Medusa="$out/medusa/drafter" Hydra="$out/hydra/drafter" Hydra++="$out/hydra_pp/drafter" \
    EAGLE-1="$out/eagle/drafter@eagle-1" EAGLE-2="$out/eagle/drafter@confidence" EAGLE-3="$out/eagle3/drafter@confidence" \
    Falcon="$out/falcon/drafter@top" DFlash="$out/dflash/drafter@slots:depth=7" \
    JetSpec="$out/jetspec/drafter@slots:depth=7" DSpark="$out/dspark/drafter@confidence:top_k=4,depth=7" \
    "draft model, chain=$small@chain" "draft model, best tree=$small@top" "RSD-C=$small@rsd-c" "RSD-S=$small@rsd-s" \
    "SpecInfer=$small@specinfer" "Sequoia=$small@sequoia" "DySpec=$small@dyspec" \
    "early exit, 2 of 5 layers=early_exit:2@top" "Token Recycling=token_recycling" "prompt lookup=prompt_lookup" \
    "Lookahead=lookahead"
job_end
