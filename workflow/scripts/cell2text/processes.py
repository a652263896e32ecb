"""Several processes that train one model, each on its own share of every step."""

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
        Its number, from 0, and how many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes files and messages."""
        return self.rank == 0

    def add_up(self, tensor: Tensor) -> Tensor:
        """Return the sum of a tensor over all processes, in its place."""
        if self.size > 1:
            distributed.all_reduce(tensor)
        return tensor

    def add_up_for(self, owner: int, tensor: Tensor) -> None:
        """Put the sum of a tensor over all processes in its place in one of them; in the others it is spoilt."""
        if self.size > 1:
            distributed.reduce(tensor, owner)

    def send(self, owner: int, tensor: Tensor) -> None:
        """Put the tensor of one process, contiguous, in its place in all."""
        if self.size > 1:
            distributed.broadcast(tensor, owner)

    def wait(self) -> None:
        """Wait until all processes have come here."""
        if self.size > 1:
            distributed.barrier()


ALONE = Team()


def run_in_processes(function: Callable[..., None], size: int, *arguments: Any) -> None:
    """Call a function of a module with a team and arguments, in so many processes; in this one if it is one.

    Each process has a GPU of its own, or else an equal share of the CPU's threads. What ends one of them ends all.

    Parameters
    ----------
    function
        Takes a :class:`Team` and the arguments, which can be pickled.
    size
        Number of processes.
    """
    if size == 1:
        function(ALONE, *arguments)
        return
    files = [
        handler.baseFilename for handler in logging.getLogger().handlers if isinstance(handler, logging.FileHandler)
    ]
    with tempfile.TemporaryDirectory() as folder:
        meeting = Path(folder, "meeting").as_uri()
        threads = max(1, torch.get_num_threads() // size)
        try:
            spawn(_run, (function, size, meeting, threads, files, arguments), nprocs=size)
        except ProcessExitedException as error:
            sys.exit(error.exit_code)


def _run(
    rank: int, function: Callable[..., None], size: int, meeting: str, threads: int, files: list[str], arguments: tuple
) -> None:
    handlers = [logging.StreamHandler(sys.stderr), *map(logging.FileHandler, files)]
    form = f"%(asctime)s process {rank}: %(message)s"
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.ERROR, handlers=handlers, format=form, datefmt="%H:%M:%S"
    )
    torch.set_num_threads(threads)
    os.environ["LOCAL_RANK"] = str(rank)
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    distributed.init_process_group(backend, init_method=meeting, rank=rank, world_size=size)
    try:
        function(Team(rank, size), *arguments)
    except InputError as error:
        log.error("%s", error)
        sys.exit(1)
    finally:
        distributed.destroy_process_group()
