#!/usr/bin/env bash
# The whole path for images on this machine, without a download: glyphs drawn with matplotlib's fonts, a VQ-VAE, a larger
# and a smaller VAR, both fine-tuned to collaborate, a classifier that judges, and a benchmark of all of them.
#
#   bash scripts/quickstart.sh images [--out DIR] [--fresh]
#   bash scripts/quickstart.sh images --emoji FILE.npz [--out DIR] [--fresh]
#
# The second takes coloured pictures of 64x64 pixels instead, from an .npz with the arrays `images` and `group`, their
# classes; about an hour on two CPU cores. Every line that starts with $ is a command of its own, to be copied, changed and
# run again. Asking again reuses what is finished and continues what was interrupted; --fresh starts over. See
# scripts/_venv.sh for TANDEM_VENV.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_job.sh"

job_options 'bash scripts/quickstart.sh images [--emoji FILE] [--out DIR] [--fresh]' "$@"
kind=${emoji:+emoji}
kind=${kind:-glyphs}
out=${out:-$ROOT/runs/$kind}
job_begin .tandem-quickstart-$kind data vqvae var var_small drafter refiner classifier results

train() {
    local name=$1 config=$2
    shift 2
    run train.main --config="configs/$config" --config.data.path="$out/data" --workdir="$out/$name" "$@"
}

tokenizer=$out/vqvae/vqvae
if [ ! -d "$out/data" ]; then
    if [ -n "$emoji" ]; then
        run scripts.build_dataset --images "$emoji" --label group --valid_documents 500 --out "$out/data"
    else
        run scripts.build_dataset --images glyphs --max_documents 21000 --valid_documents 1000 --out "$out/data"
    fi
fi
train classifier "classifier.py${emoji:+:emoji}"
train vqvae "vqvae.py:$kind"
train var "var.py:$kind" --config.objective.tokenizer="$tokenizer"
train var_small "var.py:$kind" --config.objective.tokenizer="$tokenizer" --config.objective.model.depth=3 \
    --config.objective.model.width=96 --config.objective.model.num_heads=3
train drafter "code_drafter.py:$kind" --config.objective.tokenizer="$tokenizer" \
    --config.objective.init_from="$out/var/var"
train refiner "code_refiner.py:$kind" --config.objective.tokenizer="$tokenizer" --config.objective.teacher="$out/var/var" \
    --config.objective.init_from="$out/var_small/var"
job_finished benchmark
run eval.images.main --tokenizer "$tokenizer" --var "$out/var/var" --refiner "$out/var_small/var" --draft_scales 3,4,5 \
    --drafters "3=$out/drafter/var" --refiners "3=$out/refiner/refiner" \
    --data "$out/data" --features "$out/classifier/classifier" \
    --reference_images 5000 --grid 10x2 ${emoji:+--images 500} --out "$out/results"
job_end
