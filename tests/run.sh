#!/usr/bin/env bash
# Style, types and tests, in an environment of their own (.venv, or $GS_DIST_VENV). Arguments go to pytest:
#   bash tests/run.sh                              everything that needs no card, no torch and no long wait
#   bash tests/run.sh --fast                       leaves out the rooms that start Ray or MindSpore, and what takes seconds
#   bash tests/run.sh -m slow tests/integration    what takes minutes
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=../jobs/environment.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/../jobs/environment.sh"
cd -- "$gs_dist_root"

lane=() marks="not npu and not interop and not slow and not engines"
if [ "${1-}" = --fast ]; then
    shift
    marks+=" and not seconds"
    for room in engines integration unit/calibration unit/ptq unit/runtime unit/terminal; do
        lane+=("--ignore=tests/$room")
    done
fi

make_environment test
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy
# Two processes whatever the machine: each loads MindSpore, and tests that start Ray processes stay together in one.
exec "$python" -m pytest -n 2 --dist loadgroup -m "$marks" \
    "${lane[@]}" "$@"
