#!/usr/bin/env bash
# Sets up .venv: Python 3.12, the pinned packages, the compiled ops. Safe to run again: a second run takes a second.
#
#   scripts/setup.sh          what training needs
#   scripts/setup.sh --dev    and what the tests need
#
# SMARTMOE_PYTHON names a Python 3.12 to use. The other scripts call this one first.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

requirements=requirements.txt
[[ ${1:-} == --dev ]] && requirements=requirements-dev.txt

is_python312() { "$1" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' >/dev/null 2>&1; }

# Prints the path of a Python 3.12, or fails.
find_python() {
  local candidate
  for candidate in "${SMARTMOE_PYTHON:-}" python3.12 python3 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python; do
    if [[ -n $candidate ]] && is_python312 "$candidate"; then
      "$candidate" -c 'import sys; print(sys.executable)'
      return
    fi
  done
  # uv finds the Pythons that it manages, and may fetch a 3.12 where there is none
  if command -v uv >/dev/null && candidate=$(uv python find 3.12 2>/dev/null) && is_python312 "$candidate"; then
    echo "$candidate"
    return
  fi
  return 1
}

make_venv() {
  local python
  if [[ -n ${SMARTMOE_PYTHON:-} ]] && ! is_python312 "$SMARTMOE_PYTHON"; then
    echo "error: SMARTMOE_PYTHON = $SMARTMOE_PYTHON: is not a Python 3.12. Set it to one, for example /usr/bin/python3.12, or unset it." >&2
    return 1
  fi
  if ! python=$(find_python); then
    echo "error: Python 3.12 = not found: it is neither python3.12 on PATH, nor in pyenv, nor known to uv." >&2
    echo "       Install it (pyenv install 3.12, or uv python install 3.12), or set SMARTMOE_PYTHON to one." >&2
    return 1
  fi
  echo "setup: making .venv with $python"
  rm -rf .venv
  "$python" -m venv .venv
}

# Runs a command quietly; shows its output only when it fails.
quietly() {
  local log=.venv/setup.log
  if ! "$@" >"$log" 2>&1; then
    tail -n 40 "$log" >&2
    echo "error: '$*' failed (the whole output is in $log)" >&2
    return 1
  fi
}

# Several nodes may start at once on a shared file system: one sets up, the others wait.
exec 9>.setup.lock
command -v flock >/dev/null && flock 9

is_python312 .venv/bin/python || make_venv

# What .venv was made from, in a stamp of its own for training and for the tests.
inputs_of() {
  cat "$1" requirements.txt pyproject.toml setup.py | cksum
  pwd
}
is_current() {
  local stamp=.venv/.smartmoe-$1
  [[ -f $stamp && $(<"$stamp") == "$(inputs_of "$1")" ]]
}

if ! is_current "$requirements"; then
  echo "setup: installing the pinned packages of $requirements into .venv (the first time about 3 GB, a few minutes)"
  quietly .venv/bin/python -m pip install --disable-pip-version-check -r "$requirements"
  echo "setup: building csrc and installing megatron_smartmoe"
  quietly .venv/bin/python -m pip install --disable-pip-version-check --no-build-isolation --no-deps -e .
  # What the tests need contains what training needs: a launcher that a test starts must not install again.
  for made in "$requirements" requirements.txt; do
    inputs_of "$made" >".venv/.smartmoe-$made"
  done
fi
# Rebuild the ops if csrc has changed; unchanged sources are recognised by their content.
.venv/bin/python megatron_smartmoe/ops/_build.py
