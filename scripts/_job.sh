# Sourced by scripts that do a whole job, from data to results, in one directory.
#
#   job_options USAGE "$@"     reads the options that USAGE shows, each into the variable of its name: --out DIR, --file FILE
#                              (which must exist), --flag (yes); those that are not [in brackets] must be given
#   job_begin MARKER PART...   makes $out ready, a directory that holds this job alone, known by its file MARKER; with
#                              $fresh set, removes its PARTs first, so that the job starts over
#   run MODULE ARGUMENT...     a command of the job, printed so that it can be copied, changed and run again
#   job_finished WHAT          ends the job where $out/results/results.json is there already
#   job_end                    says how long it took

source "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"

job_options() {
    local usage=$1 known=" ${1//[][]/ } " word name kind
    for word in $known; do
        [[ $word != --* ]] || printf -v "${word#--}" %s ""
    done
    shift
    while [ $# -gt 0 ]; do
        case $1 in
        -h | --help)
            sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
            exit
            ;;
        --*=*)
            word=$1
            shift
            set -- "${word%%=*}" "${word#*=}" "$@"
            ;;
        esac
        [[ $1 == --* && $known == *" $1 "* ]] || fail "unknown argument $1; usage: $usage"
        name=${1#--}
        kind=${known#*" $1 "}
        kind=${kind%% *}
        if [ -z "$kind" ]; then
            printf -v "$name" yes
        else
            [ $# -gt 1 ] || fail "$1 needs a $kind"
            [ "$kind" != FILE ] || [ -f "$2" ] || fail "$1: there is no file $2"
            printf -v "$name" %s "$([ "$kind" != FILE ] && echo "$2" || realpath "$2")"
            shift
        fi
        shift
    done
    for word in $usage; do
        name=${word#--}
        [[ $word != --* || -n ${!name} ]] || fail "$word is missing; usage: $usage"
    done
}

job_begin() {
    local marker=$1
    shift
    mkdir -p "$out" 2>/dev/null && [ -w "$out" ] || fail "cannot write to $out"
    out=$(cd "$out" && pwd)
    cd "$ROOT"
    out=${out#"$ROOT"/}  # commands to copy are shorter with a relative path
    venv_ready requirements.txt
    export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$ROOT/.cache/jax}
    # Large scratch buffers come and go at every training step; huge pages spare most of their page faults (glibc alone).
    export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
    began=$SECONDS
    if [ -n "$fresh" ] && [ -e "$out/$marker" ]; then
        (cd "$out" && rm -rf "$@")
    elif [ ! -e "$out/$marker" ] && [ -n "$(ls -A "$out")" ]; then
        fail "$out holds other files: choose an empty or new directory with --out"
    fi
    touch "$out/$marker"
}

run() {
    local argument
    printf '\n$ python -m'
    for argument in "$@"; do
        case $argument in
        '' | *\'*) printf ' %q' "$argument" ;;
        *[!A-Za-z0-9_.,:/=+-]*) printf " '%s'" "$argument" ;;
        *) printf ' %s' "$argument" ;;
        esac
    done
    printf '\n'
    "$VENV/bin/python" -m "$@"
}

job_finished() {
    [ -e "$out/results/results.json" ] || return 0
    printf '\nThe %s in %s is finished; --fresh starts everything over.\n' "$1" "$out/results"
    exit
}

job_end() {
    printf '\nFinished in %d min %d s after installation.\n' $(((SECONDS - began) / 60)) $(((SECONDS - began) % 60))
}
