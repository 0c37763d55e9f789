#!/usr/bin/env bash
# One drafter with exits for two targets against a drafter for each: the small target is stories260K (llama2.c, five
# layers), the large one is trained here on the same stories and has eight. All drafters learn from the same text, each
# exit from its target's distribution, and all drafts are chains of four.
#
#   bash scripts/nested.sh --checkpoint stories260K.bin --tokenizer tok512.bin --train train.txt --valid valid.txt
#       [--steps N] [--out DIR] [--fresh]
#
# The first two files are llama2.c's; the others hold TinyStories, parted by lines <|endoftext|>. N (800) is how long
# the nested drafter learns; the two others learn for N/2 steps each, as long in all, and for N. Then the small target's
# own first layers learn to draft for it, through a lens and by going on with the target. About 12 minutes on two CPU
# cores. Every line that starts with $ is a command of its own. Asking again reuses what is finished and continues what
# was interrupted; --fresh starts over. See scripts/_venv.sh for TANDEM_VENV.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_job.sh"

usage='--checkpoint FILE --tokenizer FILE --train FILE --valid FILE [--steps N] [--out DIR] [--fresh]'
job_options "bash scripts/nested.sh $usage" "$@"
steps=${steps:-800}
out=${out:-$ROOT/runs/nested}
job_begin .tandem-nested small data large nested one three one_long three_long lens early drafters results \
    results_large results_early

if [ ! -d "$out/small" ]; then
    run scripts.convert --from llama2c --src "$checkpoint" --tokenizer "$tokenizer" --out "$out/small"
fi
if [ ! -d "$out/data" ]; then
    run scripts.build_dataset --kind text --src "$train" --valid_src "$valid" --tokenizer "$out/small" --out "$out/data"
fi

# By name: config, steps, options.
shape=--config.objective.model
learn() {
    local name=$1 config=$2 steps=$3
    shift 3
    run train.main --config=configs/$config.py --config.data.path="$out/data" --config.steps=$steps \
        --config.batch_size=8 --config.length=256 --config.optimizer.warmup_steps=$((steps / 20)) \
        --config.evaluation.every=$steps --config.checkpoint.every=$((steps < 200 ? steps : 200)) \
        --config.checkpoint.keep=1 "$@" --workdir="$out/$name"
}
learn large lm $((steps / 2)) $shape.width=96 $shape.num_layers=8 $shape.num_heads=6 $shape.num_kv_heads=2 \
    $shape.head_dim=16 $shape.mlp_width=256 $shape.max_position=512
small=$out/small
large=$out/large/target
drafter=($shape.width=48 $shape.num_heads=4 $shape.num_kv_heads=2 $shape.head_dim=12 $shape.mlp_width=128
    $shape.max_position=512 --config.objective.hard=0.0 --config.objective.soft=1.0)
learn nested nested $steps "${drafter[@]}" $shape.num_layers=3 "--config.objective.exits=(1,)" \
    --config.objective.teachers="('$small','$large')"
# A network without an exit before its end is a drafter for one target.
alone=(--config.objective.weights="(1.0,)" --config.objective.exits="()")
for length in "" _long; do
    n=$([ -n "$length" ] && echo "$steps" || echo $((steps / 2)))
    learn one$length nested "$n" "${drafter[@]}" $shape.num_layers=1 "${alone[@]}" \
        --config.objective.teachers="('$small',)"
    learn three$length nested "$n" "${drafter[@]}" $shape.num_layers=3 "${alone[@]}" \
        --config.objective.teachers="('$large',)"
done
learn lens early_exit $((steps / 2)) --config.objective.target="$small" --config.objective.layers=2 \
    --config.objective.labels=all
learn early layer_skip $((steps / 2)) --config.objective.init_from="$small" --config.objective.exits="(2,)"

# NAME MODEL BASE [OPTION...]: a drafter directory of a model.
drafter_of() {
    [ -d "$out/drafters/$1" ] || run scripts.convert --from model --src "$out/$2/target" --base "$3" \
        --policy static:tree=chain:4 "${@:4}" --out "$out/drafters/$1"
}
mkdir -p "$out/drafters"
drafter_of nested_1 nested "$small" --exits 1
drafter_of nested_3 nested "$large" --exits 3
drafter_of nested_1_3 nested "$large" --exits 1,3 --thresholds 0.6
drafter_of nested_1_of_large nested "$large" --exits 1
for name in one one_long; do drafter_of $name $name "$small"; done
for name in three three_long; do drafter_of $name $name "$large"; done

# RESULTS TARGET METHOD...: acceptance lengths of chains of four, greedy and at temperature 1.
compare() {
    [ -e "$out/$1/results.json" ] || run eval.acceptance --target "$2" --data "$out/data" --out "$out/$1" --budgets 4 \
        --methods "${@:3}"
}
at=$out/drafters
compare results "$small" "nested, exit 1=$at/nested_1@chain" "one layer, half as long=$at/one@chain" \
    "one layer=$at/one_long@chain" "early exit, 2 layers=early_exit:2@chain" \
    "early exit, 2 layers and a lens=$out/lens/drafter@chain"
compare results_large "$large" "nested, exit 3=$at/nested_3@chain" "nested, exit 1 or 3=$at/nested_1_3@chain" \
    "nested, exit 1=$at/nested_1_of_large@chain" "three layers, half as long=$at/three@chain" \
    "three layers=$at/three_long@chain"
compare results_early "$out/early/target" "early exit, 2 layers=early_exit:2@chain"
job_end
