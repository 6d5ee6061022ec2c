#!/usr/bin/env bash
# Style, types and tests, in an environment of their own (.venv, or $GS_DIST_VENV). Arguments go to pytest:
#   bash tests/run.sh                              everything that needs no card, no torch and no long wait
#   bash tests/run.sh --fast                       the rooms that know neither Ray nor MindSpore
#   bash tests/run.sh -m slow tests/integration    what takes minutes
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=../jobs/environment.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/../jobs/environment.sh"
cd -- "$gs_dist_root"

lane=()
if [ "${1-}" = --fast ]; then
    shift
    lane=(tests/unit/test_layering.py)
    for room in tests/unit/*/; do
        case $room in
        */calibration/ | */ptq/ | */runtime/ | */terminal/ | */__pycache__/) ;;
        *) lane+=("$room") ;;
        esac
    done
fi

make_environment test
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy
exec "$python" -m pytest -m "not npu and not interop and not slow" "${lane[@]}" "$@"
