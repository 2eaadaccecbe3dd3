#!/usr/bin/env bash
# The whole chain on a laptop: tiny reasoner -> RLVR -> OPSD -> evaluation and report. Arguments are passed on to
# `python -m trl_opsd.compress`, for instance --smoke.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh none
# At this size one thread is faster than two
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1
exec .venv/bin/python -m trl_opsd.compress --config recipes/tiny/compress.yaml "$@"
