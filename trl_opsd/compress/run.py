"""A chain from its configuration to its report: what is shown on the way, and what it ends in."""

import shlex
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..cli import make_folder, user_errors
from ..evaluate.charts import PARAMETERS
from ..evaluate.report import write_report
from ..evaluate.results_file import load_results, write_rows
from ..evaluate.table import table_of
from .chain import Stage, run_chain
from .config import METHODS, CompressConfig
from .stages import label, plan_stages
from .sweep import FLOPS, SPEED, conditions, sweep_measurements


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


def run(config: CompressConfig) -> None:
    """
    Runs what is not finished of a chain, and writes its report.

    Args:
        config ([`CompressConfig`]):
            Configuration.
    """
    console = Console()
    start = time.monotonic()
    with user_errors():
        stages = plan_stages(config)
        root = Path(config.output_dir)
        make_folder(root, "output_dir")
        launcher = shlex.split(config.launcher) if config.launcher else [sys.executable]
        display = Display(console, stages)
        try:
            with display.progress:
                run_chain(stages, root / "logs", launcher, display)
        except KeyboardInterrupt:
            print("\nInterrupted: the same command goes on from here.", file=sys.stderr)
            raise SystemExit(130) from None

        conclude(config, stages, console)
    minutes, seconds = divmod(int(time.monotonic() - start), 60)
    console.print(f"{minutes} min {seconds} s. {root}/: report.html, report.md and results.json")


def conclude(config: CompressConfig, stages: list[Stage], console: Console) -> None:
    """Writes the results and the report of a chain that has run, and shows what fits a terminal."""
    root = Path(config.output_dir)
    columns = ["checkpoint", "decoding", "accuracy", "mean_tokens"]
    if config.ratios:
        measurements = sweep_measurements(config, stages)
        told = {label(method, ratio) for method in METHODS for ratio in config.ratios}
        title, columns = "Size sweep", [*columns, "parameters", "kept"]
        shown = {"axes": (PARAMETERS, FLOPS), "derived": SPEED, "remarks": [conditions(config)]}
    else:
        files = [stage.output for stage in stages if not stage.is_training]
        measurements = [item for file in files for item in load_results(file)]
        told = {"prompt-only", "opsd"}
        title, columns, shown = "trl-opsd", [*columns, "truncated"], {}
    if config.smoke:
        title = "Smoke run: numbers without meaning"
    write_rows(root / "results.json", [item.row for item in measurements], config)
    findings = write_report(measurements, root, config.compressed_from, title=title, **shown)

    headings, lines, _ = table_of(measurements, only=columns)
    table = Table(*headings)
    for cells in lines:
        table.add_row(*(text for text, _ in cells))
    console.print(table)
    for finding in findings:
        if finding.after.row.stage in told:
            console.print(finding.sentence(), markup=False, highlight=False)
