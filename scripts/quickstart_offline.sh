#!/usr/bin/env bash
# The whole path without a download: a target pretrained on Python's own standard library, Medusa and Hydra heads trained
# on it, and all three decoding held-out files in one interleaved benchmark. About 12 minutes on two CPU cores.
#
#   bash scripts/quickstart.sh --offline [--out DIR] [--fresh]     everything lies in DIR/offline
#
# Every line that starts with $ is a command of its own, to be copied, changed and run again. Asking again reuses what is
# finished and continues what was interrupted; --fresh starts over. See scripts/_venv.sh for TANDEM_VENV.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_job.sh"

job_options 'bash scripts/quickstart.sh --offline [--out DIR] [--fresh]' "$@"
out=${out:-$ROOT/runs/quickstart}/offline
job_begin .tandem-quickstart data lm continuations medusa hydra results

if [ ! -d "$out/data" ]; then
    library=$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["stdlib"])')
    run scripts.build_dataset --kind source --src "$library" --glob '**/*.py' \
        --exclude 'site-packages,test,tests,idle_test' --train_tokenizer 1024 --valid_fraction 0.03 --out "$out/data"
fi
run train.main --config=configs/lm.py:quickstart --config.data.path="$out/data" --workdir="$out/lm"
if [ ! -d "$out/continuations" ]; then
    run scripts.continue_dataset --target "$out/lm/target" --data "$out/data" --out "$out/continuations" \
        --documents 640 --new_tokens 64
fi
for drafter in medusa hydra; do
    run train.main --config=configs/$drafter.py:quickstart --config.objective.target="$out/lm/target" \
        --config.data.path="$out/continuations" --workdir="$out/$drafter"
done
for drafter in medusa hydra; do
    # The stamp lies with the heads that the tree was measured for.
    if [ ! -e "$out/$drafter/tree-chosen" ]; then
        run eval.tree --target "$out/lm/target" --drafter "$out/$drafter/drafter" --data "$out/data" --max_nodes 16 --write
        touch "$out/$drafter/tree-chosen"
    fi
done
job_finished benchmark
run eval.main --config=configs/eval/decode.py:quickstart --config.target="$out/lm/target" \
    --config.drafters="none,$out/medusa/drafter,$out/hydra/drafter" --config.data="$out/data" --config.out="$out/results"
job_end
