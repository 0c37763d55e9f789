#!/usr/bin/env bash
# An encoder-decoder and a decoder of equal size answer long prompts with one sentence: quality, time to the first
# token, tokens per second. Prompts are stories without their first sentence, answers that sentence.
#
#   bash scripts/encoder_decoder.sh --stories FILE [--distill] [--out DIR] [--fresh]
#
# FILE holds TinyStories, parted by lines <|endoftext|>. Both learn in 4 passes: the decoder from 2,674 stories, the
# encoder-decoder from the 2,404 of them that fit its rows. With --distill the encoder-decoder also learns from the
# decoder, which takes as long again: 80 min in all, on one CPU core beside other work.
# Every line that starts with $ is a command of its own. Asking again reuses what is finished and continues what was
# interrupted; --fresh starts over. See scripts/_venv.sh for TANDEM_VENV.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_job.sh"

job_options 'bash scripts/encoder_decoder.sh --stories FILE [--distill] [--out DIR] [--fresh]' "$@"
out=${out:-$ROOT/runs/encoder_decoder}
job_begin .tandem-encoder-decoder chats.jsonl chats.jinja data decoder encoder_decoder distilled results

if [ ! -f "$out/chats.jsonl" ]; then
    run scripts.openings --src "$stories" --out "$out/chats.jsonl"
fi
if [ ! -d "$out/data" ]; then
    run scripts.build_dataset --kind chat --src "$out/chats.jsonl" --valid_documents 256 --train_tokenizer 1024 \
        --chat_template "$out/chats.jinja" --out "$out/data"
fi

# 1.9M parameters each.
shape=--config.objective.model
run train.main --config=configs/lm.py --config.data.path="$out/data" --config.objective.labels=assistant \
    $shape.width=128 $shape.num_layers=10 $shape.head_dim=32 $shape.mlp_width=344 --config.batch_size=4 \
    --config.length=1280 --config.steps=450 --config.evaluation.every=150 --config.checkpoint.every=150 \
    --workdir="$out/decoder"
learn=(--config.data.path="$out/data" $shape.width=128 $shape.mlp_width=512 --config.length=64
    --config.steps=600 --config.evaluation.every=150 --config.checkpoint.every=150)
run train.main --config=configs/encoder_decoder.py "${learn[@]}" --workdir="$out/encoder_decoder"
targets=(decoder="$out/decoder/target" encoder-decoder="$out/encoder_decoder/target")
if [ -n "$distill" ]; then
    run train.main --config=configs/encoder_decoder.py:distill --config.objective.target="$out/decoder/target" \
        "${learn[@]}" --workdir="$out/distilled"
    targets+=(distilled="$out/distilled/target")
fi
job_finished comparison
run eval.answers --data "$out/data" --targets "${targets[@]}" --out "$out/results"
job_end
