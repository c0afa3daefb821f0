#!/usr/bin/env bash
# What wheels.txt names, for a machine that reaches no package registry.
# tests/gpu/wheels.sh fetch FOLDER     where there is a network: wheels for Python 3.12 on Linux, x86-64
# tests/gpu/wheels.sh install FOLDER   on the machine: into FOLDER/site, and prints what to add to PYTHONPATH
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python3}
do=${1:-} folder=${2:-}
if [ $# -ne 2 ]; then
    echo "Expected fetch or install, and a folder." >&2
    exit 2
fi
case $do in
fetch)
    platforms=()
    for tag in manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 manylinux2014 manylinux1; do
        platforms+=(--platform "${tag}_x86_64")
    done
    "$python" -m pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
        "${platforms[@]}" --dest "$folder" --requirement "$here/wheels.txt"
    ;;
install)
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target "$folder/site" "$folder"/*.whl
    echo "export PYTHONPATH=$folder/site"
    ;;
*)
    echo "Expected fetch or install, found $do." >&2
    exit 2
    ;;
esac
