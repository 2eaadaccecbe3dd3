"""Stands in for a stage of the chain: counts its runs, shows progress, and leaves what it is told to."""

import argparse
import json
import os
import sys
from pathlib import Path


parser = argparse.ArgumentParser()
for name in ("config", "output_dir", "output", "fail", "counter", "model_name_or_path", "resume_from_checkpoint"):
    parser.add_argument(f"--{name}")
args = parser.parse_args()

with Path(args.counter).open("a") as file:
    file.write(f"{Path(args.output_dir or args.output).name} {args.resume_from_checkpoint or ''}".strip() + "\n")
for step in range(5):
    print(f"\r {20 * step}%|  | {step}/4 [00:00<00:01, 1it/s]", end="", file=sys.stderr, flush=True)
if args.output_dir:
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_text("half")
fail = args.fail or os.environ.get(f"FAIL_{Path(args.output_dir or args.output).name}")
if fail:
    print(f"error: {fail}", file=sys.stderr)
    print("and a last line that says nothing", file=sys.stderr)
    raise SystemExit(2)
if args.output_dir:
    (folder / "config.json").write_text("{}")
else:
    Path(args.output).write_text(json.dumps({"rows": []}))
