"""
Command line of the whole chain: `python -m trl_opsd.compress --config recipes/tiny/compress.yaml`.

Interrupted and run again, it goes on with the first stage that is not finished. With `ratios` in the configuration it
ends in a sweep of smaller students (`recipes/tiny/size.yaml`).
"""

import json
import shlex
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..cli import parse, user_errors
from ..evaluate.report import report_results
from ..results import write_results
from . import report
from .chain import Stage, run_chain
from .config import CompressConfig
from .sweep import conditions, sweep_rows


class Display:
    """Shows the stage, its steps and the time left: a bar on a terminal, a line for each stage elsewhere."""

    def __init__(self, console: Console, stages: list[Stage]):
        self.console, self.stages = console, stages
        self.current = None
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[steps]}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
            disable=not console.is_terminal,
        )

    def __call__(self, stage: Stage, done: int, total: int, left: float) -> None:
        number = next(index for index, other in enumerate(self.stages, start=1) if other is stage)
        description = f"[{number}/{len(self.stages)}] {stage.what}"
        left = f"about {left / 60:.0f} min left in all" if left >= 90 else f"about {left:.0f} s left in all"
        if stage is not self.current:
            if self.current is not None:
                self.progress.stop_task(self.task)
            self.current = stage
            self.task = self.progress.add_task(description.replace("[", r"\["), total=None, steps="", left="")
            if not self.console.is_terminal:
                print(f"{description} ({'finished earlier' if total == 1 else left})", flush=True)
        steps = f"{done}/{total}" if total > 1 else "finished earlier" if total == 1 else ""
        self.progress.update(self.task, completed=done, total=total or None, steps=steps, left=left)


def main(args: list[str] | None = None) -> None:
    console = Console()
    start = time.monotonic()
    with user_errors():
        (config,) = parse((CompressConfig,), args, prog="trl_opsd.compress")
        stages = config.stages()
        root = Path(config.output_dir)
        launcher = shlex.split(config.launcher) if config.launcher else [sys.executable]
        display = Display(console, stages)
        try:
            with display.progress:
                run_chain(stages, root / "logs", launcher, display)
        except KeyboardInterrupt:
            print("\nInterrupted: the same command goes on from here.", file=sys.stderr)
            raise SystemExit(130) from None

        if config.ratios:
            report_sweep(config, stages, console)
            left = "report.md, its plots"
        else:
            report_chain(config, stages, console)
            left = "report.html, report.md"
    minutes, seconds = divmod(int(time.monotonic() - start), 60)
    console.print(f"{minutes} min {seconds} s. {root}/: {left} and results.json")


def report_chain(config: CompressConfig, stages: list[Stage], console: Console) -> None:
    """Writes what the chain came to, and shows what fits a terminal."""
    root = Path(config.output_dir)
    files = [stage.output for stage in stages if not stage.is_training]
    rows = [row for file in files for row in json.loads(file.read_text())["rows"]]
    before = [row["stage"] for row in rows if row["stage"] not in ("opsd", "prompt-only")][-1]
    write_results(root / "results.json", rows, config)
    title = "Smoke run: numbers without meaning" if config.smoke else "trl-opsd"
    report_results(files, root, before, title=title)

    show(console, list(report.CHAIN_COLUMNS), map(report.chain_cells, rows))
    for after in ("prompt-only", "opsd"):
        for sentence in report.compare(rows, before, after):
            console.print(sentence, highlight=False)


def report_sweep(config: CompressConfig, stages: list[Stage], console: Console) -> None:
    """Writes what the sweep came to, and shows what fits a terminal."""
    root = Path(config.output_dir)
    rows = sweep_rows(config, stages)
    write_results(root / "results.json", rows, config)
    title = "Smoke run: numbers without meaning" if config.smoke else "Size sweep"
    report.write_report(root, rows, title, conditions(config))
    narrow = ("ratio", "method", "parameters", "decoding", "accuracy", "kept", "mean_tokens")
    places = [list(report.COLUMNS).index(name) for name in narrow]  # the rest is in the report
    lines = ([report.table_cells(row)[place] for place in places] for row in rows)
    show(console, [report.COLUMNS[name] for name in narrow], lines)


def show(console: Console, headings: list[str], lines: Iterable[list[str]]) -> None:
    table = Table(*headings)
    for cells in lines:
        table.add_row(*cells)
    console.print(table)


if __name__ == "__main__":
    main()
