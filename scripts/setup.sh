#!/usr/bin/env bash
# Sets up .venv: Python 3.12, the packages, the compiled ops. Safe to run again: a second run takes a second.
#
#   scripts/setup.sh          what training needs
#   scripts/setup.sh --dev    and what the tests need
#
# By default .venv is complete, with the pinned packages. Two other ways, which later runs keep until .venv is removed:
#
#   SMARTMOE_SITE=1           on top of the Python that is active (an NGC container, conda, modules, a venv): its torch,
#                             TransformerEngine, apex and Megatron are used as they are, and only what is missing is
#                             installed, into .venv; the environment itself stays as it is
#   SMARTMOE_TORCH=torch==2.10.0    another torch than the pinned one (2.10 or later), for example for an older driver
#   SMARTMOE_TORCH_INDEX=URL        where pip finds it; for example the index of a vendor's builds
#
# SMARTMOE_PYTHON names a Python 3.12 to use. The other scripts call this one first.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

requirements=requirements.txt
[[ ${1:-} == --dev ]] && requirements=requirements-dev.txt
settings=.venv/.smartmoe-settings

is_python312() { "$1" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' >/dev/null 2>&1; }

fail() {
  printf 'error: %s\n' "$1" >&2
  shift
  (($# == 0)) || printf '       %s\n' "$@" >&2
  exit 1
}

# Prints the path of a Python 3.12, or fails. An active environment's Python is its `python`.
find_python() {
  local candidate active=()
  [[ -z ${SMARTMOE_SITE:-} ]] || active=(python)
  for candidate in "${SMARTMOE_PYTHON:-}" "${active[@]}" python3.12 python3 \
    "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python; do
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

# Prints the version of a Python's torch, or fails and prints why it does not fit. The last line: imports may warn.
torch_of() {
  "$1" -W ignore - <<'PYTHON' 2>&1 | tail -n 1
import sys
try:
    import torch
except Exception as error:
    sys.exit(f"torch = None: {sys.executable} cannot import it ({type(error).__name__}: {error})")
if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 10):
    sys.exit(f"torch = {torch.__version__}: of {sys.executable}, and 2.10 or newer is needed")
from importlib.metadata import version
print(version("torch"))  # as pip knows it: torch itself may add +cu130
PYTHON
}

make_venv() {
  local python torch
  if [[ -n ${SMARTMOE_PYTHON:-} ]] && ! is_python312 "$SMARTMOE_PYTHON"; then
    fail "SMARTMOE_PYTHON = $SMARTMOE_PYTHON: is not a Python 3.12. Set it to one, for example /usr/bin/python3.12, or unset it."
  fi
  if ! python=$(find_python); then
    fail "Python 3.12 = not found: it is neither python3.12 on PATH, nor in pyenv, nor known to uv." \
      "Install it (pyenv install 3.12, or uv python install 3.12), or set SMARTMOE_PYTHON to one."
  fi
  if [[ -n ${SMARTMOE_SITE:-} ]] && ! torch=$(torch_of "$python"); then
    fail "$torch." \
      "Activate the environment that has it, set SMARTMOE_PYTHON to its Python, or unset SMARTMOE_SITE for a torch in .venv."
  fi
  rm -rf .venv
  if [[ -n ${SMARTMOE_SITE:-} ]]; then
    echo "setup: making .venv on top of $python, with its torch $torch"
    "$python" -m venv --system-site-packages .venv
    # a venv on top of a venv sees the packages of the Python below both; those of the venv itself come by this line
    "$python" -c 'import sysconfig; print(*dict.fromkeys(sysconfig.get_path(key) for key in ("purelib", "platlib")), sep="\n")' \
      >"$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/zz-smartmoe-site.pth"
  else
    echo "setup: making .venv with $python"
    "$python" -m venv .venv
  fi
  printf '%s\n' "${SMARTMOE_SITE:-}" "${SMARTMOE_TORCH:-}" "${SMARTMOE_TORCH_INDEX:-}" >"$settings"
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

pip_install() { quietly .venv/bin/python -m pip install --disable-pip-version-check "$@"; }

# Installs the packages: the pinned ones; or, beside another torch, what is missing, and that torch held in place.
install_packages() {
  if [[ -z ${SMARTMOE_SITE:-}${SMARTMOE_TORCH:-}${SMARTMOE_TORCH_INDEX:-} ]]; then
    echo "setup: installing the pinned packages of $requirements into .venv (the first time about 3 GB, a few minutes)"
    pip_install -r "$requirements"
    echo "setup: building csrc and installing megatron_smartmoe"
    pip_install --no-build-isolation --no-deps -e .
    return
  fi
  if [[ -z ${SMARTMOE_SITE:-} ]]; then
    local index=()
    [[ -z ${SMARTMOE_TORCH_INDEX:-} ]] || index=(--index-url "$SMARTMOE_TORCH_INDEX")
    echo "setup: installing ${SMARTMOE_TORCH:-torch>=2.10} into .venv (about 3 GB, a few minutes)"
    pip_install "${index[@]}" "${SMARTMOE_TORCH:-torch>=2.10}"
  fi
  local torch
  torch=$(torch_of .venv/bin/python) || fail "$torch." "Set SMARTMOE_TORCH to one, for example torch==2.10.0."
  echo "torch===$torch" >.venv/torch.txt
  echo "setup: installing what is missing beside torch $torch into .venv, and building csrc"
  # the pins are of the tests' own tools only: what the environment has of the rest stays as it is
  grep -v '^-r ' requirements-dev.txt >.venv/dev.txt
  pip_install --constraint .venv/torch.txt 'setuptools>=77'
  pip_install --constraint .venv/torch.txt --no-build-isolation -e .
  [[ $requirements == requirements.txt ]] || pip_install --constraint .venv/torch.txt -r .venv/dev.txt 'matplotlib>=3.9' scipy
}

# Several nodes may start at once on a shared file system: one sets up, the others wait.
exec 9>.setup.lock
command -v flock >/dev/null && flock 9

if [[ -f $settings ]]; then
  mapfile -t kept <"$settings"
  if [[ -z ${SMARTMOE_SITE:-}${SMARTMOE_TORCH:-}${SMARTMOE_TORCH_INDEX:-} ]]; then
    SMARTMOE_SITE=${kept[0]} SMARTMOE_TORCH=${kept[1]} SMARTMOE_TORCH_INDEX=${kept[2]}
  elif [[ "${kept[*]}" != "${SMARTMOE_SITE:-} ${SMARTMOE_TORCH:-} ${SMARTMOE_TORCH_INDEX:-}" ]]; then
    rm -rf .venv # asked for another way: made anew
  fi
elif [[ -n ${SMARTMOE_SITE:-}${SMARTMOE_TORCH:-}${SMARTMOE_TORCH_INDEX:-} ]]; then
  rm -rf .venv
fi
if [[ -n ${SMARTMOE_SITE:-} && -n ${SMARTMOE_TORCH:-}${SMARTMOE_TORCH_INDEX:-} ]]; then
  fail "SMARTMOE_SITE = $SMARTMOE_SITE: uses the torch that is there, and SMARTMOE_TORCH asks for another. Unset one of the two."
fi
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

is_new=
if ! is_current "$requirements"; then
  install_packages
  is_new=1
  # What the tests need contains what training needs: a launcher that a test starts must not install again.
  for made in "$requirements" requirements.txt; do
    inputs_of "$made" >".venv/.smartmoe-$made"
  done
fi
# Rebuild the ops if csrc has changed; unchanged sources are recognised by their content.
.venv/bin/python megatron_smartmoe/ops/_build.py
if [[ -n $is_new && -n ${SMARTMOE_SITE:-}${SMARTMOE_TORCH:-}${SMARTMOE_TORCH_INDEX:-} ]]; then
  .venv/bin/python -m megatron_smartmoe.adapter.environment
fi
