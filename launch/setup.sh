#!/usr/bin/env bash
# Make .venv in the root of the checkout and install hydra_dist with its tests' tools into it.
# Does nothing where that was done already for this pyproject.toml, constraints.txt, Python and place.
# PYTHON=/path/to/python launch/setup.sh chooses the interpreter of a new .venv.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$root/.venv
python=$venv/bin/python
stamp=$venv/installed

say() { printf '%s\n' "$*" >&2; }

usable() { # An interpreter of a version that hydra_dist runs on; a shim for a version that is not there fails here.
  "$1" -c 'import sys; raise SystemExit(not (3, 11) <= sys.version_info[:2] < (3, 14))' >/dev/null 2>&1
}

find_python() {
  local name
  if [ -n "${PYTHON:-}" ]; then
    usable "$PYTHON" && { printf '%s\n' "$PYTHON"; return; }
    say "error: PYTHON=$PYTHON is not a Python 3.11, 3.12 or 3.13"
    return 2
  fi
  for name in python3 python3.12 python3.13 python3.11 python; do
    usable "$name" && { command -v "$name"; return; }
  done
  say "error: no Python 3.11, 3.12 or 3.13 on PATH (python3 is $(python3 -V 2>/dev/null || printf 'not there'));" \
    "install one, or name it: PYTHON=/path/to/python $0"
  return 2
}

fingerprint() { # The folder is part of it: a moved .venv holds paths of the old place.
  "$python" - "$root" <<'PYTHON'
import hashlib, pathlib, platform, sys

root = pathlib.Path(sys.argv[1])
parts = [(root / name).read_bytes() for name in ("pyproject.toml", "constraints.txt")]
parts += [platform.python_version().encode(), str(root).encode()]
print(hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in parts)).hexdigest())
PYTHON
}

installed() {
  [ -f "$stamp" ] && usable "$python" && [ "$(cat "$stamp")" = "$(fingerprint)" ]
}

lock() { # Held by file descriptor 9 until this script ends, however it ends.
  mkdir -p "$venv"
  exec 9>"$venv/setup.lock"
  "$1" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)' 2>/dev/null && return
  say "waiting for another setup in $venv"
  "$1" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)'
}

make_venv() {
  if { [ -e "$python" ] || [ -L "$python" ]; } && ! usable "$python"; then
    say "error: $python does not run, or is not a Python 3.11, 3.12 or 3.13; remove $venv and start again"
    return 2
  fi
  if [ -e "$python" ] && "$python" -c 'import pip' 2>/dev/null; then
    return
  fi
  say "making $venv with $("$1" -V)"
  "$1" -m venv "$venv" || {
    say "error: $1 cannot make a virtual environment; where Python comes in parts, its venv part is missing" \
      "(python3-venv on Debian and Ubuntu)"
    return 2
  }
}

install() {
  local pip=("$python" -m pip install --disable-pip-version-check -c constraints.txt) torch
  [ -t 2 ] || pip+=(--quiet) # progress is for people
  torch=$(grep -E '^torch==' constraints.txt)
  say "installing $torch (a download of gigabytes where it brings CUDA)"
  "${pip[@]}" "$torch"
  # DeepSpeed is built from source against what is there, so what it is built with comes before it.
  say "installing hydra_dist and what it needs"
  "${pip[@]}" 'setuptools>=77' wheel ninja packaging
  "${pip[@]}" --no-build-isolation -e '.[test]'
}

if installed; then
  exit 0
fi
base=$(find_python)
lock "$base"
if installed; then # by the one that was waited for
  exit 0
fi
rm -f "$stamp"
make_venv "$base"
cd "$root"
install
fingerprint >"$stamp.new"
mv "$stamp.new" "$stamp"
say "ready: $venv"
