# Sourced by ./run, ./test and .ci/*: one way to find the tools and to make a virtual environment.
# Needs Python 3.11+, a Rust toolchain and the package registries; nothing has to be done by hand before.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

die() {
    printf '%s: %s\n' "$(basename "$0")" "$*" >&2
    exit 1
}

step() {
    printf '\n== %s\n' "$*" >&2
}

find_tools() {
    PYTHON=${PYTHON:-python3}
    command -v "$PYTHON" >/dev/null || die "no $PYTHON: install Python 3.11 or newer, or set PYTHON"
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        die "$("$PYTHON" --version) is too old: 3.11 or newer is needed (set PYTHON to another one)"
    command -v cargo >/dev/null || die "no cargo: install a Rust toolchain (https://rustup.rs)"
}

# make_venv DIR: makes it, or takes it as it is where its Python still runs.
make_venv() {
    "$1/bin/python" -c 'import pip' 2>/dev/null && return
    rm -rf "$1"
    "$PYTHON" -m venv "$1" || die "$PYTHON -m venv failed (Debian and Ubuntu: install python3-venv)"
}

# needs TABLE...: the requirements that pyproject.toml lists under `build`, a dependency group or an extra.
needs() {
    "$PYTHON" - "$@" <<'PY'
import sys, tomllib

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)
for table in sys.argv[1:]:
    if table == "build":
        print(*project["build-system"]["requires"], sep="\n")
    elif table == "run":
        print(*project["project"]["dependencies"], sep="\n")
    else:
        groups = project["dependency-groups"] | project["project"]["optional-dependencies"]
        print(*groups[table], sep="\n")
PY
}

# install_into DIR TABLE...: the requirements, from the registry, only where they are not met.
install_into() {
    local venv=$1 list
    shift
    list=$(mktemp)
    needs "$@" >"$list"
    "$venv/bin/pip" install --quiet --requirement "$list" || die "pip could not install: $(tr '\n' ' ' <"$list")"
    rm -f "$list"
}

# build_wheel DIR PROFILE: builds with the environment's own maturin and installs the result.
build_wheel() {
    local venv=$1 profile=$2 out=target/wheels/$2
    rm -rf "$out"
    "$venv/bin/maturin" build --quiet --locked --profile "$profile" --interpreter "$venv/bin/python" --out "$out" ||
        die "the wheel did not build"
    "$venv/bin/pip" install --quiet --force-reinstall --no-deps "$out"/tdpmmu-*.whl
}
