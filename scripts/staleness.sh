#!/usr/bin/env bash
# What becomes of a draft model while its target is fine-tuned: acceptance lengths against the target's steps, of the
# draft model as it was and of one that begins from it and learns from the target after every round, for half as many
# steps.
#
#   bash scripts/staleness.sh --target DIR --drafter DIR --data DIR [--rounds N] [--steps N] [--out DIR] [--fresh]
#
# DIRs are a target, a draft model for it such as configs/distill.py makes, and a data set of its tokenizer that it has
# not learnt. N are 3 rounds of 60 steps each. About 8 minutes for stories260K on two CPU cores. Every line that starts
# with $ is a command of its own. Asking again reuses what is finished and continues what was interrupted; --fresh
# starts over. See scripts/_venv.sh for TANDEM_VENV.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_job.sh"

usage='--target DIR --drafter DIR --data DIR [--rounds N] [--steps N] [--out DIR] [--fresh]'
job_options "bash scripts/staleness.sh $usage" "$@"
out=${out:-$ROOT/runs/staleness}
rounds=${rounds:-3}
[ "$rounds" -le 20 ] || fail "--rounds must be at most 20, got $rounds"
steps=${steps:-60}
job_begin .tandem-staleness stale $(seq -f 'target_%g' 20) $(seq -f 'adapted_%g' 20) $(seq -f 'results_%g' 0 20) curves

learn() {
    local name=$1 config=$2 steps=$3
    shift 3
    run train.main --config=configs/$config --config.data.path="$data" --config.steps=$steps --config.batch_size=8 \
        --config.length=256 --config.optimizer.warmup_steps=$((steps / 10)) --config.evaluation.every=$steps \
        --config.checkpoint.every=$steps --config.checkpoint.keep=1 "$@" --workdir="$out/$name"
}
compare() {
    [ -e "$out/$1/results.json" ] || run eval.acceptance --target "$2" --data "$data" --out "$out/$1" --budgets 4 \
        --num_prompts 16 --max_new_tokens 64 --methods "${@:3}"
}
now=$target
adapted=$drafter
mkdir -p "$out/stale"
compare results_0 "$now" "as it was=$drafter@chain"
for round in $(seq "$rounds"); do
    learn target_$round finetune.py "$steps" --config.objective.init_from="$now" --config.objective.labels=all \
        --config.optimizer.learning_rate=1e-3
    now=$out/target_$round/target
    learn adapted_$round distill.py:warm $((steps / 2)) --config.objective.target="$now" \
        --config.objective.init_from="$adapted"
    adapted=$out/adapted_$round/drafter
    [ -d "$out/stale/$round" ] ||
        run scripts.convert --from drafter --src "$drafter" --base "$now" --out "$out/stale/$round"
    compare results_$round "$now" "as it was=$out/stale/$round@chain" "adapted=$adapted@chain"
done
places=() at=0
for round in $(seq 0 "$rounds"); do
    places+=("$out/results_$round")
done
for round in $(seq "$rounds"); do
    at+=,$((round * steps))
done
run eval.curves --acceptance "${places[@]}" --at "$at" --axis "steps of fine-tuning" --out "$out/curves" --overwrite
job_end
