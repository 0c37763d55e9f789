#!/usr/bin/env bash
# What becomes of a draft model while its target is fine-tuned: acceptance lengths against the target's steps, of the
# draft model as it was and of one that begins from it and learns from the target after every round, for half as many
# steps.
#
#   bash scripts/staleness.sh --target DIR --drafter DIR --data DIR [--rounds N] [--steps N] [--out DIR] [--fresh]
#
# DIRs are target directories, the second of a draft model that learnt from the first, and a data set of their
# tokenizer. N are 3 rounds of 60 steps each. About 8 minutes for stories260K on two CPU cores. Every line that starts
# with $ is a command of its own. Asking again reuses what is finished and continues what was interrupted; --fresh
# starts over. See scripts/_venv.sh for TANDEM_VENV.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_job.sh"

usage='--target DIR --drafter DIR --data DIR [--rounds N] [--steps N] [--out DIR] [--fresh]'
job_options "bash scripts/staleness.sh $usage" "$@"
out=${out:-$ROOT/runs/staleness}
rounds=${rounds:-3}
steps=${steps:-60}
job_begin .tandem-staleness $(seq -f 'target_%g' 20) $(seq -f 'drafter_%g' 20) $(seq -f 'results_%g' 0 20) drafters

learn() {
    local name=$1 config=$2 steps=$3
    shift 3
    run train.main --config=configs/$config --config.data.path="$data" --config.steps=$steps --config.batch_size=8 \
        --config.length=256 --config.optimizer.warmup_steps=$((steps / 10)) --config.evaluation.every=$steps \
        --config.checkpoint.every=$steps --config.checkpoint.keep=1 "$@" --workdir="$out/$name"
}
drafter_of() {
    [ -d "$out/drafters/$1" ] || run scripts.convert --from model --src "$2" --base "$3" \
        --policy static:tree=chain:4 --out "$out/drafters/$1"
}
compare() {
    [ -e "$out/$1/results.json" ] || run eval.acceptance --target "$2" --data "$data" --out "$out/$1" --budgets 4 \
        --num_prompts 16 --max_new_tokens 64 --methods "${@:3}"
}
mkdir -p "$out/drafters"
now=$target
adapted=$drafter
drafter_of stale_0 "$drafter" "$now"
compare results_0 "$now" "as it was=$out/drafters/stale_0@chain"
for round in $(seq "$rounds"); do
    learn target_$round finetune.py "$steps" --config.objective.init_from="$now" --config.objective.labels=all \
        --config.optimizer.learning_rate=1e-3
    now=$out/target_$round/target
    learn drafter_$round nested.py:warm $((steps / 2)) --config.objective.init_from="$adapted" \
        --config.objective.exits="()" --config.objective.hard=0.0 --config.objective.soft=1.0 \
        --config.objective.teachers="('$now',)"
    adapted=$out/drafter_$round/target
    drafter_of stale_$round "$drafter" "$now"
    drafter_of adapted_$round "$adapted" "$now"
    compare results_$round "$now" "as it was=$out/drafters/stale_$round@chain" \
        "adapted=$out/drafters/adapted_$round@chain"
done
job_end
