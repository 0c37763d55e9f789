#!/usr/bin/env bash
# Coprocessors of one target in one table and one plot: by how many percent they change perplexity at offsets 1 to 32
# behind their latents, with 95% intervals; more and more latents, and at one number of them every other kind and the
# two baselines, whose soft tokens alone are learnt.
#
#   bash scripts/coprocessor.sh [--data DIR] [--target DIR] [--out DIR] [--steps N] [--rate X] [--soft_rate X]
#       [--latents N,...] [--kinds NAMES] [--kinds_at N,...] [--batch N] [--length N] [--places N] [--ahead N] [--rows N]
#       [--base_steps N] [--shape SIZES] [--jobs N] [--fresh]
#
# All learn from the same text for N steps, `full` coprocessors with every number in --latents, those of --kinds (full,
# lora, scratch, last_layer, hold, pause, soft) with every number in --kinds_at. Without --data, the text is Python's own
# standard library in bytes; without --target, a model of SIZES, fields of its shape, learns the data first, and serves.
# --jobs N trains so many at a time, each with a log beside its directory. About an hour on two CPU cores with the
# defaults, an estimate; minutes on a GPU. Every line that starts with $ is a command of its own. Asking again reuses what
# is finished and continues what was interrupted; --fresh starts over. See scripts/_venv.sh for TANDEM_VENV.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_job.sh"

job_options 'bash scripts/coprocessor.sh [--data DIR] [--target DIR] [--out DIR] [--steps N] [--rate X] [--soft_rate X]
    [--latents N,...] [--kinds NAMES] [--kinds_at N,...] [--batch N] [--length N] [--places N] [--ahead N] [--rows N]
    [--base_steps N] [--shape SIZES] [--jobs N] [--fresh]' "$@"
[ -z "$data" ] || data=$(realpath "$data")
[ -z "$target" ] || target=$(realpath "$target")
out=${out:-$ROOT/runs/coprocessors}
steps=${steps:-600} rate=${rate:-1.5e-3} soft_rate=${soft_rate:-1e-2} latents=${latents:-4,8,16,32,64}
kinds=${kinds:-lora,scratch,last_layer,pause,soft} kinds_at=${kinds_at:-8}
batch=${batch:-16} length=${length:-128} places=${places:-16} ahead=${ahead:-8} rows=${rows:-64}
base_steps=${base_steps:-1200} jobs=${jobs:-1}
shape=${shape:-width=96 num_layers=3 num_heads=6 num_kv_heads=2 head_dim=16 mlp_width=256}
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
directories=()
taught() { # NAME LATENTS OPTION...: in turn, or some side by side
    local workdir=$out/runs/$1 number=$2
    shift 2
    directories+=("$workdir/coprocessor")
    set -- run train.main --config=configs/coprocessor.py:bytes --config.objective.target="$target" \
        --config.data.path="$data" --config.steps="$steps" --config.batch_size="$batch" --config.length="$length" \
        --config.objective.places="$places" --config.objective.ahead="$ahead" \
        --config.objective.coprocessor.num_latents="$number" --config.optimizer.learning_rate="$rate" \
        --config.objective.soft.learning_rate="$soft_rate" --config.evaluation.every=$(((steps + 3) / 4)) "$@" \
        --workdir="$workdir"
    if [ "$jobs" = 1 ]; then
        "$@"
        return
    fi
    while [ "$(jobs -rp | wc -l)" -ge "$jobs" ]; do
        wait -n
    done
    "$@" >>"$workdir.log" 2>&1 &
    echo "training $workdir ($workdir.log)"
}
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
kind=--config.objective.coprocessor.kind
for number in ${latents//,/ }; do
    taught "full_$number" "$number"
done
for number in ${kinds_at//,/ }; do
    for name in ${kinds//,/ }; do
        case $name in
        full) options=() ;;
        last_layer) options=(--config.objective.coprocessor.reads=last_layer) ;;
        hold) options=(--config.objective.coprocessor.positions=hold) ;;
        *) options=("$kind=$name") ;;
        esac
        taught "${name}_$number" "$number" ${options[@]+"${options[@]}"}
    done
done
while [ -n "$(jobs -rp)" ]; do
    wait -n
done

job_finished comparison
run eval.quality --target "$target" --coprocessors "$(IFS=, && echo "${directories[*]}")" --data "$data" \
    --length "$length" --rows "$rows" --points 32 --ahead 32 --out "$out/results"
job_end
