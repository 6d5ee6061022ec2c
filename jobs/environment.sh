# Sourced by jobs/quickstart.sh and tests/run.sh: a virtual environment of the repository's own.
# shellcheck shell=bash

gs_dist_root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

# Prints a Python that MindSpore 2.10 has wheels for. $PYTHON, if set, is the only candidate.
find_python() {
    local candidate version seen=""
    for candidate in ${PYTHON:-python3.11 python3.12 python3.10 python3 python}; do
        version=$("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue
        case $version in
        3.10 | 3.11 | 3.12)
            command -v -- "$candidate"
            return
            ;;
        esac
        seen="$seen $candidate is Python $version;"
    done
    fail "no Python 3.11 found (3.10 and 3.12 do as well):${seen:- no python on PATH;}" \
        "install python3.11 with its venv module, or set PYTHON to its path"
}

# make_environment EXTRA: the package, editable, with an extra of pyproject.toml. Sets $python to its
# interpreter. An environment that was made from the same pyproject.toml is used as it is.
make_environment() {
    local extra=$1 venv=${GS_DIST_VENV:-$gs_dist_root/.venv} base stamp wanted
    stamp=$venv/gs-dist-$extra.stamp
    wanted="$gs_dist_root $(cksum <"$gs_dist_root/pyproject.toml")"
    python=$venv/bin/python
    if [ -f "$stamp" ] && [ "$(cat -- "$stamp")" = "$wanted" ] && "$python" -c '' 2>/dev/null; then
        return
    fi
    if ! "$python" -m pip --version >/dev/null 2>&1; then
        base=$(find_python)
        printf 'making a virtual environment in %s\n' "$venv"
        "$base" -m venv --clear "$venv" ||
            fail "$base could not make a virtual environment; install its venv module (Debian: python3.11-venv)"
    fi
    printf 'installing gs-dist[%s] (about 1 GB to download the first time)\n' "$extra"
    "$python" -m pip install -qq --disable-pip-version-check --editable "${gs_dist_root}[$extra]" ||
        fail "pip could not install gs-dist[$extra]; its messages are above"
    printf '%s' "$wanted" >"$stamp"
}
