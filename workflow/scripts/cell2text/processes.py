"""Training with several processes, each of which computes its own share of every step."""

import logging
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torch.multiprocessing import ProcessExitedException, spawn

from cell2text.errors import InputError

log = logging.getLogger("cell2text.training")


@dataclass(frozen=True)
class Team:
    """One of the processes that train together.

    Parameters
    ----------
    rank, size
        Number of this process, from 0, and number of all processes.
    """

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes files and messages."""
        return self.rank == 0

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its sum over all processes, and return it."""
        if self.size > 1:
            distributed.all_reduce(tensor)
        return tensor

    def reduce(self, owner: int, tensor: Tensor) -> None:
        """Replace a tensor by its sum over all processes in one of them; in the others it becomes undefined."""
        if self.size > 1:
            distributed.reduce(tensor, owner)

    def broadcast(self, owner: int, tensor: Tensor) -> None:
        """Replace a contiguous tensor by that of one process, in all processes."""
        if self.size > 1:
            distributed.broadcast(tensor, owner)

    def wait(self) -> None:
        """Wait until all processes reach this call."""
        if self.size > 1:
            distributed.barrier()


ALONE = Team()


def run_in_processes(function: Callable[..., None], size: int, *arguments: Any) -> None:
    """Call a function in ``size`` new processes, or in this process if ``size`` is 1.

    Each process has its own GPU, or an equal share of the CPU's threads. If one of them stops, all stop.

    Parameters
    ----------
    function
        A function of a module, called with a :class:`Team` and the arguments.
    size
        Number of processes.
    arguments
        Must be picklable.
    """
    if size == 1:
        function(ALONE, *arguments)
        return
    files = [
        handler.baseFilename for handler in logging.getLogger().handlers if isinstance(handler, logging.FileHandler)
    ]
    with tempfile.TemporaryDirectory() as folder:
        address = Path(folder, "meeting").as_uri()
        threads = max(1, torch.get_num_threads() // size)
        try:
            spawn(_run, (function, size, address, threads, files, arguments), nprocs=size)
        except ProcessExitedException as error:
            sys.exit(error.exit_code)


def _run(
    rank: int, function: Callable[..., None], size: int, address: str, threads: int, files: list[str], arguments: tuple
) -> None:
    handlers = [logging.StreamHandler(sys.stderr), *map(logging.FileHandler, files)]
    line = f"%(asctime)s process {rank}: %(message)s"
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.ERROR, handlers=handlers, format=line, datefmt="%H:%M:%S"
    )
    torch.set_num_threads(threads)
    os.environ["LOCAL_RANK"] = str(rank)
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    distributed.init_process_group(backend, init_method=address, rank=rank, world_size=size)
    try:
        function(Team(rank, size), *arguments)
    except InputError as error:
        log.error("%s", error)
        sys.exit(1)
    finally:
        distributed.destroy_process_group()
