#!/usr/bin/env bash
# Everything of this repository that wants an accelerator, in one command, in order of worth: whether texts are right on
# it, plain decoding beside Hugging Face's, steps of all drafters, an oracle, long contexts and large batches, training
# steps, images, and heads trained for a chat model; each part with a limit of its own, results written as they come.
#
#   bash scripts/accelerator.sh [--out DIR] [--minutes 8] [--parts NAME,...] [--target DIR] [--wheels DIR] [--tiny]
#   bash scripts/accelerator.sh smollm2 --rehearse --out DIR [--minutes 2]
#
# It runs where nothing can be fetched: $TANDEM_PYTHON (python3) is taken as it is, packages that it lacks come from a
# folder of wheels, and a part that lacks some is skipped, which is said. --target is a chat model's directory, for the
# last part. `smollm2` runs that part alone, with options of its own; --rehearse makes a target of SmolLM2's shape with
# random weights and compiles and times the training steps, so that a second call in the same place (and with the same
# --cache) spends its time on training. Options: `python -m scripts.accelerator --help`, and `... .smollm2 --help`.
set -euo pipefail
here=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${TANDEM_PYTHON:-python3}
module=scripts.accelerator
arguments=()
if [ "${1-}" = smollm2 ]; then
    module=$module.smollm2
    shift
fi
while [ $# -gt 0 ]; do
    case $1 in
    --*=*)
        set -- "${1%%=*}" "${1#*=}" "${@:2}"
        continue
        ;;
    esac
    # Paths are meant from where the command was given.
    case $1 in
    --out | --wheels | --target | --questions | --chats | --cache | --back)
        [[ -z ${2-} || $2 = /* ]] || set -- "$1" "$here/$2" "${@:3}"
        ;;
    --shape)  # A name, or a directory.
        [[ -z ${2-} || $2 = /* || ! -f $here/$2/config.json ]] || set -- "$1" "$here/$2" "${@:3}"
        ;;
    esac
    case $1 in
    --wheels)
        [ -d "${2-}" ] || { echo "error: --wheels needs a folder, and ${2:-nothing} is none" >&2 && exit 2; }
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
"$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("jax") is None)' || {
    echo "error: $python has no jax: name another Python with TANDEM_PYTHON, or a folder that has it with --wheels" >&2
    exit 2
}
exec "$python" -m "$module" ${arguments[@]+"${arguments[@]}"}
