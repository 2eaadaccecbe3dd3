"""
Measures how many programs per second the sandbox judges, with one and with two at a time.

    python -m scripts.benchmarks.sandbox

The program is short, so this is what a sandbox costs. The cases take turns, so that whatever else the machine does meets
them alike, and the load of the machine is written down with each. Results go to recipes/results/sandbox/cpu.json.
"""

import argparse
import os
import statistics
import time
from pathlib import Path

from scripts.harness.results import RESULTS, read, write_results
from scripts.harness.tables import markdown
from trl_opsd.rewards import code_reward


PROGRAM = "def is_prime(n):\n    return n > 1 and all(n % k for k in range(2, int(n**0.5) + 1))\n"
TESTS = "def check(candidate):\n    assert [n for n in range(10) if candidate(n)] == [2, 3, 5, 7]\n"


def table() -> str:
    """Programs per second, and the load that the machine had meanwhile."""
    lines = [
        [
            str(row["workers"]),
            f"{row['programs_per_second']} ({row['programs_per_second_min']} to {row['programs_per_second_max']})",
            str(row["load_average"]),
        ]
        for row in read(RESULTS / "sandbox" / "cpu.json")
    ]
    return markdown(["at a time", "programs per second, median (lowest to highest)", "load of the machine"], lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=int, default=100, help="programs per measurement")
    parser.add_argument("--repeats", type=int, default=5, help="measurements per number of workers")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="programs at a time")
    parser.add_argument("--output", type=Path, default=RESULTS / "sandbox" / "cpu.json")
    args = parser.parse_args(argv)

    columns = {"tests": [TESTS] * args.programs, "entry_point": ["is_prime"] * args.programs}
    rates, loads = {workers: [] for workers in args.workers}, {workers: [] for workers in args.workers}
    for _ in range(args.repeats):
        for workers in args.workers:
            loads[workers].append(os.getloadavg()[0])
            start = time.perf_counter()
            scores = code_reward([PROGRAM] * args.programs, num_workers=workers, **columns)
            rates[workers].append(args.programs / (time.perf_counter() - start))
            assert scores == [1.0] * args.programs
    rows = [
        {
            "workers": workers,
            "programs_per_second": round(statistics.median(rates[workers]), 1),
            "programs_per_second_min": round(min(rates[workers]), 1),
            "programs_per_second_max": round(max(rates[workers]), 1),
            "load_average": round(statistics.median(loads[workers]), 1),
        }
        for workers in args.workers
    ]
    for row in rows:
        print(row)
    write_results(args.output, rows, {"programs": args.programs, "repeats": args.repeats})


if __name__ == "__main__":
    main()
