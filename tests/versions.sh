#!/usr/bin/env bash
# The tests with the oldest or the newest releases that pyproject.toml allows, in a fresh virtual environment:
#     tests/versions.sh oldest|newest [--keep FOLDER] [pytest's arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

which=${1:-}
[[ $which == oldest || $which == newest ]] || { sed -n '2,3s/^# *//p' "$0" >&2; exit 2; }
shift

if [[ ${1:-} == --keep ]]; then # an environment that stays, and is used again
    venv=$2
    shift 2
else
    venv=$(mktemp -d)
    trap 'rm -rf "$venv"' EXIT
fi

if [[ ! -e $venv/ready ]]; then
    python3 -m venv "$venv"
    touch "$venv/constraints.txt"
    tools=()
    if [[ $which == oldest ]]; then # every lower bound of pyproject.toml, to the letter
        grep -oE '"[a-z][a-z-]*>=[0-9.]+"' setup.py | tr -d '"' | sed 's/>=/==/' > "$venv/constraints.txt"
        tools=(scipy) # diffusers 0.30, which the tests compare with, imports it
    fi
    "$venv/bin/pip" install --quiet --upgrade --constraint "$venv/constraints.txt" -e ".[dev]" "${tools[@]}"
    touch "$venv/ready"
fi

"$venv/bin/pip" list --format freeze | grep -E '^(torch|pytorch-lightning|transformers|numpy|diffusers)=='
"$venv/bin/python" -m pytest "$@"
