#!/usr/bin/env bash
# Coprocessors of one target in one table and one plot: by how many percent they change perplexity at offsets 1 to 32
# behind their latents, with 95% intervals; more and more latents, and at one number of them every other kind and the
# two baselines, whose soft tokens alone are learnt.
#
#   bash scripts/coprocessor.sh [--data DIR] [--target DIR] [--out DIR] [--config VARIANT] [--labels NAME] [--main NAME]
#       [--latents N,...] [--kinds NAMES] [--kinds_at N,...] [--steps N] [--rate X] [--soft_rate X] [--batch N]
#       [--length N] [--places N] [--ahead N] [--rows N] [--base_steps N] [--shape SIZES] [--jobs N] [--fresh]
#
# All learn from the same text by the recipe of configs/coprocessor.py:VARIANT (bytes), of which --steps to --ahead
# change what is given: the kind --main (full) with every number in --latents, those of --kinds with every number in
# --kinds_at. Kinds are full, lora, scratch, last_layer, pause and soft; hold, hold_pause and hold_soft, whose latents
# move no position; hold_rms, hold with latents as large as embeddings; and last_token, with _lora, _pause and _soft,
# which are those of hold_rms, of _pause those of hold, whose last latent begins as the token before it. --labels (all, or
# assistant for chats) are the tokens learnt and measured. Without --data, the text is Python's own standard library in
# bytes; without --target, a model of SIZES, fields of its shape, learns the data first, and serves. Files are held out
# whole, by their names, and this target reads none of them either; of another --target that is for you to know.
#
# 4,000 steps of 16 rows, the default, take about 17 min with 4 latents and 25 min with 8 on one CPU core (measured
# beside other work), and all of the defaults some six hours on one, an estimate: --latents 4,8 --kinds pause,soft is
# two. Fewer steps end before latents pay. --jobs N trains so many at a time, each with a log beside its directory.
# Every line that starts with $ is a command of its own. Asking again reuses what is finished and continues what was
# interrupted; --fresh starts over. See scripts/_venv.sh for TANDEM_VENV.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_job.sh"

job_options 'bash scripts/coprocessor.sh [--data DIR] [--target DIR] [--out DIR] [--config VARIANT] [--labels NAME]
    [--main NAME] [--latents N,...] [--kinds NAMES] [--kinds_at N,...] [--steps N] [--rate X] [--soft_rate X] [--batch N]
    [--length N] [--places N] [--ahead N] [--rows N] [--base_steps N] [--shape SIZES] [--jobs N] [--fresh]' "$@"
[ "${length:-128}" -gt 32 ] || fail "--length must be more than the 32 offsets that are compared, got $length"
[ -z "$target" ] || [ -z "$base_steps$shape" ] ||
    fail "--base_steps and --shape are for a target that is made here, not for that of --target"
out=${out:-$ROOT/runs/coprocessors}
config=${config:-bytes} labels=${labels:-all} main=${main:-full} latents=${latents:-4,8,16,32,64}
kinds=${kinds:-lora,scratch,last_layer,pause,soft} kinds_at=${kinds_at:-8}
batch=${batch:-16} length=${length:-128} rows=${rows:-64}
base_steps=${base_steps:-1200} jobs=${jobs:-1}
shape=${shape:-width=96 num_layers=3 num_heads=6 num_kv_heads=2 head_dim=16 mlp_width=256}
every=(full lora scratch last_layer pause soft hold hold_pause hold_soft hold_rms
    last_token last_token_lora last_token_pause last_token_soft)
job_names --config "$config" lora paper bytes smollm2 smoke
job_names --labels "$labels" all assistant
job_names --main "$main" "${every[@]}"
job_names --kinds "$kinds" "${every[@]}"
changes=(--config.batch_size="$batch" --config.length="$length" --config.objective.labels="$labels")
[ -z "$steps" ] || changes+=(--config.steps="$steps")
[ -z "$rate" ] || changes+=(--config.optimizer.learning_rate="$rate")
[ -z "$soft_rate" ] || changes+=(--config.objective.soft.learning_rate="$soft_rate")
[ -z "$places" ] || changes+=(--config.objective.places="$places")
[ -z "$ahead" ] || changes+=(--config.objective.ahead="$ahead")
job_begin .tandem-coprocessors data base runs results

if [ -z "$data" ]; then
    data=$out/data
    if [ ! -d "$data" ]; then
        library=$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["stdlib"])')
        run scripts.build_dataset --kind source --src "$library" --glob '**/*.py' \
            --exclude 'site-packages,test,tests,idle_test' --train_tokenizer 258 --valid_fraction 0.03 --out "$data"
    fi
fi
if [ -z "$target" ]; then
    sizes=()
    for size in $shape; do
        sizes+=("--config.objective.model.$size")
    done
    run train.main --config=configs/lm.py --config.data.path="$data" --config.steps="$base_steps" \
        --config.batch_size="$batch" --config.length="$length" --config.optimizer.name=adamw \
        --config.optimizer.learning_rate=3e-3 --config.optimizer.warmup_steps=$((base_steps / 20)) \
        --config.evaluation.every="$base_steps" "${sizes[@]}" --workdir="$out/base"
    target=$out/base/target
fi

mkdir -p "$out/runs"
directories=() trainings=()
failed() {
    fail "a training failed: its log in $out/runs says why"
}
taught() { # NAME LATENTS, in turn, or some side by side
    local workdir=$out/runs/$1_$2 options part=--config.objective.coprocessor
    [[ " ${directories[*]-} " != *" $workdir/coprocessor "* ]] || return 0
    directories+=("$workdir/coprocessor")
    case $1 in
    last_layer) options=($part.kind=full $part.reads=last_layer) ;;
    hold) options=($part.kind=full $part.positions=hold) ;;
    hold_pause | hold_soft) options=($part.kind="${1#hold_}" $part.positions=hold) ;;
    hold_rms) options=($part.kind=full $part.positions=hold $part.z_scale=match_rms) ;;
    last_token_pause) options=($part.kind=pause $part.positions=hold $part.z_base=last_token) ;;
    last_token*)
        options=($part.kind=full $part.positions=hold $part.z_scale=match_rms $part.z_base=last_token)
        [ "$1" = last_token ] || options[0]=$part.kind="${1#last_token_}"
        ;;
    *) options=($part.kind="$1") ;;
    esac
    [[ $1 != *pause ]] || options+=($part.z_scale=none $part.z_tap=post_norm) # It has no network to take them of.
    set -- run train.main --config=configs/coprocessor.py:"$config" --config.objective.target="$target" \
        --config.data.path="$data" "${changes[@]}" $part.num_latents="$2" "${options[@]}" --workdir="$workdir"
    if [ "$jobs" = 1 ]; then
        "$@"
        return
    fi
    while [ "$(jobs -rp | wc -l)" -ge "$jobs" ]; do
        wait -n || failed
    done
    (instead=exec && "$@") >>"$workdir.log" 2>&1 & # In the shell's place, so that the trap stops the training itself.
    trainings+=($!)
    echo "training $workdir ($workdir.log)"
}
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
for number in ${latents//,/ }; do
    taught "$main" "$number"
done
for number in ${kinds_at//,/ }; do
    for name in ${kinds//,/ }; do
        taught "$name" "$number"
    done
done
for training in ${trainings[@]+"${trainings[@]}"}; do
    wait "$training" || failed
done

job_finished comparison
run eval.quality --target "$target" --coprocessors "$(IFS=, && echo "${directories[*]}")" --data "$data" \
    --length "$length" --labels "$labels" --rows "$rows" --points 32 --ahead 32 --out "$out/results"
job_end
