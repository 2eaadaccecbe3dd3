#!/usr/bin/env bash
# The tests. Arguments are passed on to pytest; `-m slow`, `-m vllm`, `-m deepspeed` and `-m gpu` run the slower tiers.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=.venv extra=dev
case " $* " in
    *" -m vllm "*) venv=.venv-vllm extra=vllm ;;
    *" -m deepspeed "*) extra=dev,deepspeed ;;
esac
bash scripts/setup.sh "$extra"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1
exec "$venv/bin/python" -m pytest "$@"
