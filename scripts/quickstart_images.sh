#!/usr/bin/env bash
# The whole path for images on this machine, without a download: glyphs drawn with matplotlib's fonts, a VQ-VAE, a larger
# and a smaller VAR, a refiner that learns from the larger one, a classifier that judges, and a benchmark of all of them.
#
#   bash scripts/quickstart.sh images [--out DIR] [--fresh]
#
# Every line that starts with $ is a command of its own, to be copied, changed and run again. Asking again reuses what is
# finished and continues what was interrupted; --fresh starts over. See scripts/_venv.sh for TANDEM_VENV.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"

out=$ROOT/runs/glyphs
fresh=""
while [ $# -gt 0 ]; do
    case $1 in
    --out)
        [ $# -gt 1 ] || fail "--out needs a directory"
        out=$2
        shift
        ;;
    --out=*) out=${1#*=} ;;
    --fresh) fresh=yes ;;
    -h | --help)
        sed -n '2,/^set/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
        exit
        ;;
    *) fail "unknown argument $1; usage: bash scripts/quickstart.sh images [--out DIR] [--fresh]" ;;
    esac
    shift
done
mkdir -p "$out" 2>/dev/null && [ -w "$out" ] || fail "cannot write to $out"
out=$(cd "$out" && pwd)
cd "$ROOT"
out=${out#"$ROOT"/}  # commands to copy are shorter with a relative path
venv_ready requirements.txt
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$ROOT/.cache/jax}
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
began=$SECONDS

# --fresh removes only what an earlier quickstart made, in a directory that one has marked as its own.
marker=$out/.tandem-quickstart-images
if [ -n "$fresh" ] && [ -e "$marker" ]; then
    rm -rf "$out"/{data,vqvae,var,var_small,refiner,classifier,results}
elif [ ! -e "$marker" ] && [ -n "$(ls -A "$out")" ]; then
    fail "$out holds other files: choose an empty or new directory with --out"
fi
touch "$marker"

run() {
    printf '\n$ python -m %s\n' "$*"
    "$VENV/bin/python" -m "$@"
}

train() {
    local name=$1 config=$2
    shift 2
    run train.main --config="configs/$config" --config.data.path="$out/data" --workdir="$out/$name" "$@"
}

tokenizer=$out/vqvae/vqvae
if [ ! -d "$out/data" ]; then
    run scripts.build_dataset --images glyphs --max_documents 21000 --valid_documents 1000 --out "$out/data"
fi
train classifier classifier.py
train vqvae vqvae.py:glyphs
train var var.py:glyphs --config.objective.tokenizer="$tokenizer"
train var_small var.py:glyphs_small --config.objective.tokenizer="$tokenizer"
train refiner code_refiner.py:glyphs --config.objective.tokenizer="$tokenizer" \
    --config.objective.teacher="$out/var/var" --config.objective.init_from="$out/var_small/var"
if [ -e "$out/results/results.json" ]; then
    printf '\nThe benchmark in %s is finished; --fresh starts everything over.\n' "$out/results"
    exit
fi
run eval.images.main --tokenizer "$tokenizer" --var "$out/var/var" --refiner "$out/var_small/var" --draft_scales 2,3,4,5 \
    --refiners "3=$out/refiner/refiner" --data "$out/data" --features "$out/classifier/classifier" \
    --reference_images 5000 --out "$out/results"

printf '\nFinished in %d min %d s after installation.\n' $(((SECONDS - began) / 60)) $(((SECONDS - began) % 60))
