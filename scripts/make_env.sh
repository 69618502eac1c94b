#!/usr/bin/env bash
# Makes .venv with Python 3.12, installs what pyvdl needs and builds the C++ decoder into it.
# System packages come by apt when this user may install them; otherwise the exact line to run is printed (exit 2).
set -euo pipefail
cd "$(dirname "$0")/.."

packages=(build-essential pkg-config python3-venv libavformat-dev libavcodec-dev libavutil-dev libswscale-dev)

have_system_packages() {
  command -v c++ >/dev/null && command -v pkg-config >/dev/null &&
    pkg-config --exists libavformat libavcodec libavutil libswscale &&
    python3 -c 'import ensurepip, venv' 2>/dev/null
}

if ! have_system_packages; then
  install="apt-get update && apt-get install -y --no-install-recommends ${packages[*]}"
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    DEBIAN_FRONTEND=noninteractive bash -c "$install"
  elif command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
    sudo DEBIAN_FRONTEND=noninteractive bash -c "$install"
  else
    printf 'pyvdl needs system packages that are not installed. Run this once, then make again:\n  sudo bash -c "%s"\n' "$install" >&2
    exit 2
  fi
fi

if [ ! -x .venv/bin/python ] || ! .venv/bin/python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))'; then
  rm -rf .venv
  if python3.12 -c 'import ensurepip, venv' 2>/dev/null; then
    python3.12 -m venv .venv
  else
    # No usable Python 3.12 on PATH: let uv find one (or bring one).
    if ! command -v uv >/dev/null; then
      python3 -m venv build/uv
      build/uv/bin/pip install --quiet uv
      PATH="$PWD/build/uv/bin:$PATH"
    fi
    uv venv --python 3.12 --seed .venv
  fi
fi

.venv/bin/python -m pip install --quiet --disable-pip-version-check uv
# Compiled here once: where Python is told to write no bytecode, each process would spend two seconds on JAX's alone.
uv=(.venv/bin/uv pip install --quiet --compile-bytecode --python .venv/bin/python --constraint constraints.txt)
"${uv[@]}" "setuptools>=77" "nanobind>=3.1" "cmake>=3.25" ninja
PATH="$PWD/.venv/bin:$PATH" "${uv[@]}" --no-build-isolation --editable ".[text,eval,stats,demo,parquet,llm,ray,s3,dev]"
touch .venv/.made
