#!/usr/bin/env bash
# Train configs/quickstart.yaml on this machine: one process per GPU, or two on the CPU.
#   launch/quickstart.sh [section.key=value ...]
# Paths in settings are relative to the root of the checkout. A run that was interrupted goes on from its newest
# checkpoint. Ends with 2 for a mistake in the settings.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
"$root/launch/setup.sh"
cd "$root"
python=$root/.venv/bin/python
config=configs/quickstart.yaml
corpus=data/stdlib
settings=("$@")

# What the settings say of the device, the corpus and the run's folder, and whether that run has its last evaluation.
facts=$(
  "$python" - "$config" ${settings[@]+"${settings[@]}"} <<'PYTHON'
import json, pathlib, sys

from hydra_dist.config.file import load_config
from hydra_dist.errors import UserError

try:
    config = load_config(sys.argv[1], sys.argv[2:])
except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(error.exit_code)
run = pathlib.Path(config.run.directory).absolute()
evaluation = run / "evaluation.json"
done = json.loads(evaluation.read_text(encoding="utf-8"))["step"] if evaluation.exists() else 0
print(config.train.device, config.data.directory, "yes" if done >= config.train.steps else "no", run, sep="\n")
PYTHON
)
{ read -r device && read -r data && read -r finished && read -r run; } <<<"$facts"

gpus=0
if [ "$device" != cpu ]; then
  gpus=$("$python" -c 'import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)')
fi
if [ "$gpus" -gt 0 ]; then
  processes=$gpus
  # First, so that what was typed wins.
  settings=("context.size=$gpus" ${settings[@]+"${settings[@]}"})
else
  processes=2
  cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > processes ? cores / processes : 1))}
  export DS_ACCELERATOR=cpu
fi

if [ "$data" = "$corpus" ] && [ ! -e "$corpus/manifest.json" ]; then
  "$python" -m hydra_dist.cli data prepare --input stdlib --output "$corpus" --tokenizer train:8192
fi
"$python" -m hydra_dist.cli check "$config" --processes "$processes" ${settings[@]+"${settings[@]}"}

if [ "$finished" = yes ]; then
  echo "finished already (another run.directory=, or more train.steps=, trains on)"
else
  "$python" -m torch.distributed.run --standalone --nproc-per-node "$processes" \
    -m hydra_dist.train "$config" ${settings[@]+"${settings[@]}"}
fi

echo "a sample:"
"$python" -m hydra_dist.cli generate "$run" --prompt 'class Ring:' --tokens 96
cat <<TEXT

loss and where it falls  $run/loss.png
held-out evaluation      $run/evaluation.json
every step               $run/metrics.jsonl, and tensorboard --logdir $run/tensorboard
checkpoints              $run/checkpoints
resolved configuration   $run/config.yaml
another sample           .venv/bin/hydra-dist generate $run --prompt 'def '
TEXT
