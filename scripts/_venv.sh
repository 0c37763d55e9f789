# Sourced by scripts/test.sh and scripts/quickstart.sh: one virtual environment with exactly the pinned requirements.
#
#   venv_ready FILE...    makes $VENV if need be and installs FILE... into it, unless these very files were installed
#                         there before; afterwards "$VENV/bin/python" is ready
#
# TANDEM_VENV moves the environment (default: .venv beside README.md), TANDEM_PYTHON names the interpreter to make it
# with, Python 3.11 to 3.14 (default: the first of python3.11, ..., python3.14, python3, python that is one). What is in
# an environment stays there: one made by other means gets pip if it has none, and what is missing.

set -euo pipefail
unset CDPATH  # With it, cd may go elsewhere, and says where.
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${TANDEM_VENV:-$ROOT/.venv}
unset PYTHONPATH
export PIP_DISABLE_PIP_VERSION_CHECK=1

fail() {
    echo "error: $*" >&2
    exit 2
}

# Runs what is named instead of trusting its name: version managers leave stubs on the PATH that only print an error.
right_python() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null
}

find_python() {
    local candidate without_venv=""
    local candidates=${TANDEM_PYTHON:-python3.11 python3.12 python3.13 python3.14 python3 python}
    for candidate in $candidates; do
        right_python "$candidate" || continue
        if "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
            echo "$candidate"
            return
        fi
        without_venv=$candidate
    done
    [ -z "$without_venv" ] || fail "$without_venv cannot make virtual environments: install its venv module" \
        "(on Debian and Ubuntu: apt-get install python3-venv) and try again"
    fail "Python 3.11 to 3.14 is needed, and none of these is one: $candidates;" \
        "install it, or name one with TANDEM_PYTHON=PATH"
}

has_pip() {
    "$VENV/bin/python" -m pip --version >/dev/null 2>&1
}

# Never empties a folder: an environment may hold what its owner put there.
make_venv() {
    local python elsewhere="move it away, or set TANDEM_VENV to another path"
    if [ -z "$(ls -A "$VENV/" 2>/dev/null)" ]; then
        python=$(find_python) || exit
        echo "Making a virtual environment in $VENV with $("$python" --version)"
        "$python" -m venv "$VENV" || fail "could not make a virtual environment in $VENV"
    fi
    [ -e "$VENV/pyvenv.cfg" ] || fail "$VENV exists and is no virtual environment: $elsewhere"
    right_python "$VENV/bin/python" || fail "the Python of $VENV does not run or is not 3.11 to 3.14: $elsewhere"
    has_pip && return
    # It was made by a tool that brings no pip, or its making was interrupted.
    "$VENV/bin/python" -m ensurepip >/dev/null 2>&1 && has_pip || fail "$VENV has no pip and cannot get one: $elsewhere"
}

venv_ready() {
    local file stamp wanted requirements=()
    make_venv
    stamp=$VENV/.installed-$(echo "$@" | tr -c 'a-z0-9\n' '-')
    wanted=$(cd "$ROOT" && "$VENV/bin/python" -c 'import hashlib, sys; print(
        hashlib.sha256(b"".join(open(path, "rb").read() for path in sys.argv[1:])).hexdigest())' requirements.txt "$@")
    [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ] || return 0
    for file in "$@"; do
        requirements+=(-r "$ROOT/$file")
    done
    echo "Installing $* into $VENV (the first time takes a few minutes)"
    rm -f "$stamp"
    "$VENV/bin/python" -m pip install "${requirements[@]}" |
        awk '/^(Collecting|Building|Installing|Successfully)|^ *Downloading .*\([0-9.]+ [MG]B\)/ { print "  " substr($0, 1, 110); fflush() }' ||
        fail "pip could not install $*; its message is above"
    echo "$wanted" >"$stamp"
}
