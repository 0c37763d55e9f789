#!/usr/bin/env bash
# Draft models distilled from a target, every divergence on every source of text, at equal budgets in one table: acceptance
# by position, acceptance length and speed, greedily and at temperature 1, over several seeds.
#
#   bash scripts/distill.sh --target DIR --data DIR [--out DIR] [--student SIZES] [--steps N] [--batch N] [--start_steps N]
#       [--seeds N] [--divergences NAMES] [--sources NAMES] [--documents N] [--tokens N] [--reuse N]
#       [--questions FILE] [--pack] [--fresh]
#
# A small model first learns the data set's text (--start_steps, three times --steps), and every other begins from it:
# undistilled, it goes on as it was; the others learn for as many steps by what --divergences names from the text that
# --sources name: those of configs/distill.py and `minillm`. Of `teacher` there are --documents, with the text itself
# learnt, too (sequence-level distillation); what `student`, `served` and `minillm` write serves --reuse steps, so that
# they see fewer different texts.
#
# Equal are steps, rows per step, optimizer (Muon, cosine) and rate. A row has at most --tokens labels: so many behind a
# prompt of 32, or a document's row without one. Texts that end sooner have fewer, `served` learns where drafts were
# rejected alone, and `minillm` has the data set's row on top: the table's column `labels` says how many a row had.
# Seeds differ in the order of the data and in draws; the model that all begin from and the target's continuations are
# made once, so intervals over seeds leave out what these two would vary.
#
# With --questions the data are chats, such as the target wrote (scripts.continue_dataset): labels are answers, all begin
# from the shape and the projected embeddings of configs/distill.py:smollm2, rows have 288 tokens more than --tokens, and
# what is decoded are first turns of FILE in the chat template. --pack leaves every drafter in `packed`, at 8 bits.
#
# SIZES are fields of the student's shape, such as "width=32 head_dim=8 mlp_width=88". Of stories260K all by the defaults
# takes about 50 min on one CPU core, and as long again for every two further seeds.
# Every line that starts with $ is a command of its own. Asking again reuses what is finished and continues what was
# interrupted; --fresh starts over. The record of every run lies beside the table, in results/runs. See scripts/_venv.sh
# for TANDEM_VENV.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_job.sh"

job_options 'bash scripts/distill.sh --target DIR --data DIR [--out DIR] [--student SIZES] [--steps N] [--batch N]
    [--start_steps N] [--seeds N] [--divergences NAMES] [--sources NAMES] [--documents N] [--tokens N] [--reuse N]
    [--questions FILE] [--pack] [--fresh]' "$@"
out=${out:-$ROOT/runs/distillation}
prompt=$([ -z "$questions" ] && echo 32 || echo 288)
[ -n "$questions" ] || student=${student:-width=32 head_dim=8 mlp_width=88 max_position=512}
steps=${steps:-150} batch=${batch:-8} seeds=${seeds:-3} tokens=${tokens:-224} reuse=${reuse:-4}
start_steps=${start_steps:-$((3 * steps))} documents=${documents:-3072}
divergences=${divergences:-forward_kl,reverse_kl,jsd,tvd}
sources=${sources:-$([ -z "$questions" ] && echo dataset,teacher,student || echo dataset,student),mixed,served,minillm}
job_names --sources "$sources" dataset teacher student mixed served minillm
[ -z "$questions" ] || [[ ",$sources," != *,teacher,* ]] || fail "--sources: with --questions the data are the teacher's"
job_names --divergences "$divergences" forward_kl reverse_kl jsd skewed_kl skewed_reverse_kl tvd tvd++ nla hybrid
job_begin .tandem-distillation start continuations runs acceptance greedy sampled packed results

shape=()
for size in $student; do
    shape+=("--config.objective.model.$size")
done
begin=(--config.data.path="$data" --config.steps="$start_steps" --config.batch_size="$batch"
    --config.optimizer.warmup_steps=$((start_steps / 15)) ${shape[@]+"${shape[@]}"} --workdir="$out/start")
if [ -z "$questions" ]; then
    run train.main --config=configs/draft_model.py "${begin[@]}"
    start=$out/start/target labels=all whole=$((tokens + 1))
    asked=(--data "$data" --num_prompts 64) timed=(--config.data="$data" --config.num_prompts=4 --config.rows=4)
else
    run train.main --config=configs/distill.py:smollm2 --config.objective.target="$target" --config.objective.hard=1 \
        --config.objective.soft=0 --config.objective.loop_prompts=0 "${begin[@]}"
    start=$out/start/drafter labels=assistant whole=$((tokens + prompt))
    asked=(--prompts "$questions" --chat --num_prompts 24)
    timed=(--config.prompts="$questions" --config.chat=True --config.num_prompts=8 --config.max_new_tokens=64)
fi

methods=() drafters=none
learn=(--config.objective.target="$target" --config.data.path="$data" --config.steps="$steps"
    --config.batch_size="$batch" --config.length=$((tokens + prompt)) --config.evaluation.every="$steps"
    --config.evaluation.batches=4 --config.checkpoint.every=$((25 * reuse)) --config.optimizer.name=muon
    --config.optimizer.learning_rate=1e-3 --config.optimizer.schedule=cosine --config.optimizer.final_fraction=0.1
    --config.optimizer.warmup_steps=$((steps / 10)))
row() { # NAME PLACE [DRAFTER]: a row of the table, of as many runs as there are seeds, PLACE-0, PLACE-1, ...
    local seed
    for ((seed = 0; seed < seeds; seed++)); do
        methods+=("$1#$seed=$out/runs/$2-$seed/${3:-drafter}@chain")
    done
    drafters+=,$out/runs/$2-0/${3:-drafter}  # What a step costs is the same for every seed.
}
together() { # SOURCE ROW DATA LABELS LENGTH: all divergences on one text, and as ROW that text itself; one run per seed
    local seed name all=--config.objective.members.undistilled.objective
    for ((seed = 0; seed < seeds; seed++)); do
        run train.main --config="configs/divergences.py:warm+undistilled,$divergences" "${learn[@]}" \
            --config.data.path="$3" $all.labels="$4" --config.length="$5" $all.init_from="$start" \
            --config.seed="$seed" --workdir="$out/runs/$1-$seed"
    done
    row "$2" "$1" drafters/undistilled
    for name in ${divergences//,/ }; do
        row "$name/$1" "$1" "drafters/$name"
    done
}
alone() { # NAME CONFIG OPTION...: one run per seed
    local name=$1 config=$2 seed
    shift 2
    for ((seed = 0; seed < seeds; seed++)); do
        run train.main --config="$config" "${learn[@]}" --config.objective.init_from="$start" \
            --config.seed="$seed" --config.objective.loop_prompts=0 --config.objective.new_tokens="$tokens" \
            --config.objective.reuse="$reuse" --config.objective.labels="$labels" "$@" \
            --workdir="$out/runs/$name-$seed"
    done
    row "$name" "$name"
}
job_finished comparison
acceptances=()
measured() { # SOURCE FIRST: the rows from number FIRST on, which an interruption does not take with those before
    acceptances+=("$out/acceptance/$1")
    [ -e "$out/acceptance/$1/results.json" ] || run eval.acceptance --target "$target" "${asked[@]}" --budgets 4 \
        --out "$out/acceptance/$1" --methods "${methods[@]:$2}"
}
for source in ${sources//,/ }; do
    before=${#methods[@]}
    case $source in
    dataset) together dataset undistilled "$data" "$labels" "$whole" ;;
    teacher)
        # Its text does not depend on who learns it, and is written in large batches.
        [ -d "$out/continuations" ] || run scripts.continue_dataset --target "$target" --data "$data" --temperature 1 \
            --out "$out/continuations" --documents "$documents" --valid_documents 128 --prompt_tokens "$prompt" \
            --new_tokens "$tokens" --rows 64
        together teacher sequence "$out/continuations" assistant $((tokens + prompt))
        ;;
    minillm) alone minillm configs/minillm.py ;;
    *)
        # Only a rejected draft's place is learnt from a served text, by whatever divergence: one row is enough.
        for divergence in $([ "$source" = served ] && echo forward_kl || echo "${divergences//,/ }"); do
            # Of the data set's text, the other half of `mixed`, every step reads a batch of its own.
            alone "$divergence/$source" configs/distill.py:warm --config.objective.source="$source" \
                --config.objective.divergence.name="$divergence" \
                --config.objective.reuse="$([ "$source" = mixed ] && echo 1 || echo "$reuse")"
        done
        ;;
    esac
    measured "$source" "$before"
done
for temperature in 0 1; do
    place=$out/$([ $temperature = 0 ] && echo greedy || echo sampled)
    if [ ! -e "$place/results.json" ]; then
        run eval.main --config=configs/eval/decode.py --config.target="$target" --config.drafters="$drafters" \
            "${timed[@]}" --config.samples=0 --config.parts=False \
            --config.sampling.temperature="$temperature" --config.out="$place"
    fi
done
if [ -n "$pack" ]; then
    for method in "${methods[@]}"; do
        method=${method#*=} name=${method#"$out/runs/"}
        name=$(tr / - <<<"${name%@chain}")
        [ -d "$out/packed/$name" ] || run scripts.pack_drafter --src "${method%@chain}" --out "$out/packed/$name" --bits 8
    done
fi
mkdir -p "$out/results/runs"
for record in $(cd "$out" && find start runs -name run.json); do
    record=${record%/run.json}
    cp "$out/$record/run.json" "$out/results/runs/$(tr / - <<<"${record#runs/}").json"
done
run eval.seeds --acceptance "${acceptances[@]}" --speed "$out/greedy" "$out/sampled" --out "$out/results"
job_end
