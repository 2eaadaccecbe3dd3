#!/usr/bin/env bash
# The tests at an end of what pyproject.toml promises: `bash scripts/versions.sh lowest` with the lowest version of each
# dependency and the lowest Python, `highest` with the newest of both. Later arguments go to pytest. Each has an environment
# of its own, .venv-lowest and .venv-highest; PYTHON names another interpreter. torch comes as the index has it, which may
# be a CUDA build of some gigabytes.
set -euo pipefail
cd "$(dirname "$0")/.."
end=${1:-}
case $end in
    lowest) python=3.11 options=(--resolution lowest-direct) ;;
    highest) python=3.13 options=(--upgrade) ;;
    *)
        echo "error: say which end: bash scripts/versions.sh lowest, or highest." >&2
        exit 2
        ;;
esac
shift
venv=.venv-$end
want=$(cat pyproject.toml scripts/versions.sh | sha256sum)
if [ "$(cat "$venv/.installed" 2>/dev/null)" != "$want" ]; then
    [ -x .venv-uv/bin/uv ] || { python3 -m venv .venv-uv && .venv-uv/bin/python -m pip install --quiet uv; }
    .venv-uv/bin/uv venv --quiet --clear --seed --python "${PYTHON:-$python}" "$venv" || {
        echo "error: there is no Python ${PYTHON:-$python} here, and none could be fetched: set PYTHON to the path of one." >&2
        exit 2
    }
    # Compiled as pip does it, so that what Python says of a package's source is not printed by the first command
    .venv-uv/bin/uv pip install --quiet --compile-bytecode --python "$venv/bin/python" "${options[@]}" --editable '.[dev]'
    echo "$want" >"$venv/.installed"
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1
"$venv/bin/python" - <<'PY'
from importlib.metadata import version
from platform import python_version

print(f"Python {python_version()},", ", ".join(f"{name} {version(name)}" for name in "torch transformers trl accelerate peft datasets".split()))
PY
exec "$venv/bin/python" -m pytest "$@"
