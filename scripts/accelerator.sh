#!/usr/bin/env bash
# What this repository wants an accelerator for, in one command: the target writes chats, heads are trained on them side
# by side, and all of them decode held-out questions; in order of worth, each part with a limit of its own, results
# written as they come.
#
#   bash scripts/accelerator.sh --target DIR --out DIR [--minutes 8] [--questions FILE.jsonl] [--wheels DIR]
#   bash scripts/accelerator.sh --rehearse --out DIR [--minutes 2]
#
# It runs where nothing can be fetched: $TANDEM_PYTHON (python3) is taken as it is, and packages that it lacks come from
# a folder of wheels. --rehearse makes a target of SmolLM2's shape with random weights and compiles and times the
# training steps, so that a second call in the same place (and with the same --cache) spends its time on training. The
# options are those of `python -m scripts.accelerator --help`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${TANDEM_PYTHON:-python3}
arguments=()
while [ $# -gt 0 ]; do
    case $1 in
    --wheels)
        site=$(mktemp -d)
        "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$2"/*.whl ||
            { echo "error: could not install the wheels of $2" >&2 && exit 2; }
        export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
        shift
        ;;
    -h | --help)
        sed -n '2,/^set/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
        exit
        ;;
    *) arguments+=("$1") ;;
    esac
    shift
done
exec "$python" -m scripts.accelerator "${arguments[@]}"
