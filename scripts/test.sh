#!/usr/bin/env bash
# Sets up what the tests need, then lints, type-checks and tests.
#
#   bash scripts/test.sh [--parity] [pytest arguments]
#
# Without arguments the whole of tests/ runs, except what is marked slow: repeats of what other drafters show, and long
# training (`-m slow` runs those, `-m ""` all). It ends with the ten slowest files. --parity also installs torch and
# transformers and compares with them; without it those comparisons use committed golden files and the rest of them is
# reported as skipped. See scripts/_venv.sh for TANDEM_VENV and TANDEM_PYTHON; JAX_COMPILATION_CACHE_DIR moves the cache
# of compiled programs (default: .cache/jax), which makes every run after the first much shorter.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"
cd "$ROOT"

requirements=(requirements-dev.txt)
arguments=()
for argument in "$@"; do
    case $argument in
    --parity) requirements+=(requirements-parity.txt) ;;
    -h | --help)
        sed -n '2,/^set/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
        exit
        ;;
    *) arguments+=("$argument") ;;
    esac
done

export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$ROOT/.cache/jax}
summary=""
failed=0

# Runs every stage even when one fails, so that one run tells everything that is wrong.
stage() {
    local name=$1 start=$SECONDS verdict=ok
    shift
    printf '\n== %s\n' "$name"
    "$@" || { verdict=FAILED failed=1; }
    summary+=$(printf '%-12s %4d s  %s' "$name" $((SECONDS - start)) "$verdict")$'\n'
}

start=$SECONDS
venv_ready "${requirements[@]}"
summary+=$(printf '%-12s %4d s  ok' set-up $((SECONDS - start)))$'\n'
stage lint "$VENV/bin/python" -m ruff check
stage format "$VENV/bin/python" -m ruff format --check
# Types are checked beside the tests, on what the cores have left.
types=$(mktemp)
trap 'rm -f "$types"' EXIT
"$VENV/bin/python" -m mypy >"$types" 2>&1 &
mypy=$!
types_are_sound() {
    local verdict=0
    wait "$mypy" || verdict=$?
    cat "$types"
    return "$verdict"
}
# One worker per core, which takes whole groups of tests that share what they compile, long ones first (tests/schedule.py).
# Every call into these packages is checked against its annotations, shapes and dtypes included, so that a signature
# cannot lie; inside jit while tracing.
stage tests "$VENV/bin/python" -m pytest -n auto --dist loadgroup --no-loadscope-reorder \
    --jaxtyping-packages=models,decoding,beartype.beartype ${arguments[@]+"${arguments[@]}"}
stage types types_are_sound
printf '\n%s' "$summary"
exit "$failed"
