#!/usr/bin/env bash
# Run the whole test suite: launch/test.sh [pytest arguments]
# Tests marked "full" run with -m full alone; tests in tests/gpu run where there is a GPU.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
"$root/launch/setup.sh"
cd "$root"
exec "$root/.venv/bin/python" -m pytest "$@"
