"""Arms in processes of their own: no arm leaves memory, caches or settings to the next one."""

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any


@contextmanager
def _printing_to(path: Path) -> Iterator[None]:
    """Gives processes that start within the block a file in place of the terminal, from their first import on."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = {stream: os.dup(stream) for stream in (1, 2)}
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        for stream in kept:
            os.dup2(log, stream)
        yield
    finally:
        for stream, terminal in kept.items():
            os.dup2(terminal, stream)
            os.close(terminal)
        os.close(log)


@contextmanager
def process() -> Iterator[Callable]:
    """
    Starts a process with the environment of this one, which ends with the block.

    Yields:
        `Callable`: `call(function, *args)` calls a function of some module in that process and returns, or raises, what
        the function does. Nothing that is printed there shows, unless the process dies.
    """
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool,
    ):
        log = Path(folder, "log")
        with _printing_to(log):
            pool.submit(int)  # this starts it

        def call(function: Callable, *args) -> Any:
            try:
                return pool.submit(function, *args).result()
            except BrokenProcessPool:
                message = f"The process of `{function.__name__}` died after printing:\n{log.read_text()}"
                raise RuntimeError(message) from None

        yield call


def run_alone(function: Callable, *args) -> Any:
    """Calls a function in a process that exists for this call only, and returns what it returns."""
    with process() as call:
        return call(function, *args)


def run_distributed(number: int, function: Callable, *args) -> list:
    """
    Calls a function in each of several processes that find each other as those of `torchrun` do.

    Args:
        number (`int`):
            How many. A single one is no group: it runs as in [`run_alone`].
        function (`Callable`):
            Function of some module.
        args:
            What it is called with, the same in every process.

    Returns:
        `list`: What each returned, by rank.
    """
    if number == 1:
        return [run_alone(function, *args)]
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as `torchrun` does
    with tempfile.TemporaryDirectory() as folder:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=number,
            run_id=function.__name__,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        log = Path(folder, "log")
        try:
            with _printing_to(log):
                ranks = elastic_launch(config, function)(*args)
        except ChildFailedError as error:
            message = f"A process of `{function.__name__}` failed after printing:\n{log.read_text()}\n{error}"
            raise RuntimeError(message) from None
    return [ranks[rank] for rank in range(number)]
