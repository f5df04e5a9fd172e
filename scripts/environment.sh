# Sourced by the other scripts: makes .venv once. Sets ROOT, and PYTHON, the interpreter to use.

ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
VENV=$ROOT/.venv
PYTHON=$VENV/bin/python

die() {
    printf '%s: %s\n' "$(basename -- "$0")" "$*" >&2
    exit 1
}

# A python3 of 3.11 or newer; the first one that runs (a version manager's shim may exist without its version).
find_python() {
    local candidate
    for candidate in python3 python3.14 python3.13 python3.12 python3.11 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    die "Python 3.11 or newer is needed and none was found on PATH (python3 is: $(python3 --version 2>&1 || true))"
}

# ensure_environment NAME PIP-ARGUMENTS…: install once per content of pyproject.toml; NAME tells the stamps apart.
ensure_environment() {
    local name=$1 wanted stamp
    shift
    stamp=$VENV/.stamp-$name
    wanted=$(cksum <"$ROOT/pyproject.toml")" $ROOT"
    environment_is_current "$stamp" "$wanted" && return
    [ ! -e "$VENV" ] || [ -w "$VENV" ] || die "$VENV belongs to another user: remove it, or run this as its owner"
    mkdir -p "$VENV" || die "cannot write to $ROOT"
    # Two scripts at once must not install into each other.
    exec 9>"$VENV/.lock"
    if command -v flock >/dev/null; then flock 9; fi
    if ! environment_is_current "$stamp" "$wanted"; then
        make_venv
        echo "installing into $VENV (once)" >&2
        "$PYTHON" -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1' ||
            die "pip could not be upgraded: see above"
        (cd "$ROOT" && "$PYTHON" -m pip install --quiet --disable-pip-version-check "$@") ||
            die "the installation failed: see above"
        printf '%s\n' "$wanted" >"$stamp"
    fi
    exec 9>&-
}

environment_is_current() {
    [ -f "$1" ] && [ "$(cat "$1")" = "$2" ] && "$PYTHON" -c '' 2>/dev/null
}

make_venv() {
    local python
    "$PYTHON" -m pip --version >/dev/null 2>&1 && return
    python=$(find_python) || exit 1
    "$python" -m venv --clear "$VENV" ||
        die "no virtual environment could be made; on Debian and Ubuntu: apt-get install python3-venv"
}
