#!/usr/bin/env bash
# The tests, two files at a time. Arguments are passed on to pytest, which then takes one at a time; `-m slow`, `-m vllm`,
# `-m deepspeed` and `-m gpu` run the slower tiers.
# `--trl-tests PATH` runs a test file of TRL's with our trainers in the place of TRL's.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=.venv extra=dev
case " $* " in
    *" -m vllm "*) venv=.venv-vllm extra=vllm ;;
    *" -m deepspeed "*) extra=dev,deepspeed ;;
esac
bash scripts/setup.sh "$extra"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1
if [[ ${1:-} == --trl-tests ]]; then
    export PYTHONPATH=$PWD/tests${PYTHONPATH:+:$PYTHONPATH}
    set -- -p trl_swap -c pyproject.toml "${@:2}"
fi
[ $# -gt 0 ] || set -- -n 2 --dist loadfile
exec "$venv/bin/python" -m pytest "$@"
