#!/usr/bin/env bash
# Trains with and without Thunder in an environment of its own: test.sh [FOLDER OF THE ENVIRONMENT, default .venv beside this] [pytest's options]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
environment=${1:-$here/.venv}
[ -x "$environment/bin/python" ] || python3 -m venv "$environment"
"$environment/bin/pip" install --quiet -e "$root" -e "$here" pytest pytest-timeout
cd "$root"
"$environment/bin/python" -m pytest -c "$here/pyproject.toml" --rootdir "$root" -p no:cacheprovider -q --show-capture=no "$here" "${@:2}"
