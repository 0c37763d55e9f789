# Sourced by scripts that do a whole job, from data to results, in one directory.
#
#   job_options USAGE "$@"     reads the options that USAGE shows, each into the variable of its name: --out DIR, --flag
#                              (yes), a FILE or another DIR that must exist, N or N,... from 1 on, X above 0, SIZES as
#                              NAME=VALUE, anything else as it is; those that are not [in brackets] must be given
#   job_names OPTION NAMES KNOWN...    ends the job where one of NAMES is none of KNOWN, or there twice
#   job_begin MARKER PART...   makes $out ready, a directory that holds this job alone, known by its file MARKER, and that
#                              works for one call at a time, all with the same options; with $fresh set, removes its
#                              PARTs first, so that the job starts over
#   run MODULE ARGUMENT...     a command of the job, printed so that it can be copied, changed and run again; where
#                              $instead is exec, in the place of this shell
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
            job_option "$1" "$kind" "${2-}"
            shift
        fi
        shift
    done
    for word in $usage; do
        name=${word#--}
        [[ $word != --* || -n ${!name} ]] || fail "$word is missing; usage: $usage"
    done
    given=""
    for word in $known; do
        name=${word#--}
        # Where results lie, how many learn at a time and where a file came from change nothing.
        [[ $word != --* || $word == --@(out|fresh|jobs|wheel) || -z ${!name} ]] || given+=" $word=${!name}"
    done
    given=${given# }
}

job_option() {  # OPTION KIND VALUE
    local value=$3 number='[1-9][0-9]{0,8}'
    [[ -n $value && $value != --* ]] || fail "$1 needs a $2"
    [[ $2 != FILE || -f $value ]] || fail "$1: there is no file $value"
    [[ $2 != DIR || $1 == --out || -d $value ]] || fail "$1: there is no directory $value"
    [[ $2 != N || $value =~ ^$number$ ]] || fail "$1 must be a whole number from 1 on, got $value"
    [[ $2 != N,... || $value =~ ^$number(,$number)*$ ]] ||
        fail "$1 must be whole numbers from 1 on with commas between them, got $value"
    [[ $2 != X || $value =~ ^([0-9]+\.?|[0-9]*\.[0-9]+)(e[+-]?[0-9]+)?$ && $value =~ ^[^e]*[1-9] ]] ||
        fail "$1 must be a number above 0, got $value"
    [[ $2 != SIZES || $value =~ ^\ *[a-z_]+=[^\ =]+(\ +[a-z_]+=[^\ =]+)*\ *$ ]] ||
        fail "$1 must be NAME=VALUE, with spaces between several, got $value"
    [[ $2 != FILE && ( $2 != DIR || $1 == --out ) ]] || value=$(realpath "$value")
    printf -v "${1#--}" %s "$value"
}

job_names() {
    local option=$1 names=" ${2//,/ } " name
    shift 2
    [[ -n ${names// /} ]] || fail "$option must name at least one of $*"
    for name in $names; do
        [[ " $* " == *" $name "* ]] || fail "$option: there is no $name, only $*"
        [[ ${names/ $name / } != *" $name "* ]] || fail "$option names $name twice"
    done
}

job_begin() {
    marker=$1
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
    # A lock on the directory itself, so that nothing need be written before it is known whose it is. What this starts
    # inherits it: while a command of a call that was killed still runs, the directory is not free.
    exec 9<"$out"
    ! command -v flock >/dev/null || flock -n 9 || fail "$out is being written by another job: wait for it to end"
    if [ -n "$fresh" ] && [ -e "$out/$marker" ]; then
        (cd "$out" && rm -rf "$@")
    elif [ ! -e "$out/$marker" ] && [ -n "$(ls -A "$out")" ]; then
        fail "$out holds other files: choose an empty or new directory with --out"
    fi
    touch "$out/$marker"
    local made part
    made=$(<"$out/$marker")
    for part in "$@"; do
        [[ $made != asked* || $made == "asked $given" || ! -e $out/$part ]] ||
            fail "$out is of other options,${made#asked}: choose another --out, or start over with --fresh"
    done
    echo "asked $given" >"$out/$marker"
}

instead=""
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
    $instead "$VENV/bin/python" -m "$@"
}

job_finished() {
    [ -e "$out/results/results.json" ] || return 0
    printf '\nThe %s in %s is finished; --fresh starts everything over.\n' "$1" "$out/results"
    exit
}

job_end() {
    printf '\nFinished in %d min %d s after installation.\n' $(((SECONDS - began) / 60)) $(((SECONDS - began) % 60))
}
