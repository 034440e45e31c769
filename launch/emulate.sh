#!/usr/bin/env bash
# Many ranks as real processes on one GPU, or on a CPU, over gloo: launch/emulate.sh RANKS CONFIG [section.key=value ...]
# Slower than the ranks will be, and otherwise the run they will make: DeepSpeed, checkpoints and all.
set -euo pipefail

if [[ $# -lt 2 || ! $1 =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: launch/emulate.sh RANKS CONFIG [section.key=value ...]" >&2
    exit 2
fi
ranks=$1 config=$2
shift 2
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
"$root/launch/setup.sh"
exec "$root/.venv/bin/hydra-dist" train "$config" train.share_gpu=true "$@" --processes "$ranks"
