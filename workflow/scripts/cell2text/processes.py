"""Training with several processes, each of which computes its own share of every step, and the signals that end it."""

import ctypes
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import torch
from torch import Tensor, distributed
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException, spawn

from cell2text.errors import InputError, in_one_line
from cell2text.job import MEETING, find_process_number

log = logging.getLogger("cell2text.training")

TERMINATED = 128 + signal.SIGTERM  # exit code of a run that a signal ended and that can be resumed
REPORTED = 2  # exit code of a process that has reported an InputError
PR_SET_PDEATHSIG = 1  # in linux/prctl.h


@contextmanager
def listen_for_signals(forward: Callable[[], None] = lambda: None) -> Iterator[Event]:
    """Yield an event that is set when the process receives SIGTERM or SIGINT.

    SLURM sends SIGTERM before the time limit, a terminal SIGINT at Ctrl-C. Once one was received, both are ignored for
    good, so that none can interrupt the writing of a checkpoint.

    Parameters
    ----------
    forward
        Called at each signal.
    """
    stop = Event()

    def heed(*_: object) -> None:
        stop.set()
        forward()

    # one that the parent told this process to ignore, such as SIGINT in the background of a shell, stays ignored
    heard = [number for number in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, heed) for number in heard}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if stop.is_set() else handler)


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
PATIENCE = 5  # seconds


def count_processes(gpus: int, allowed: int) -> int:
    """Return the number of processes that train together: one per GPU, or one on the CPU if no GPU is visible.

    Parameters
    ----------
    gpus
        Number of GPUs in the config.
    allowed
        Number of GPUs that Snakemake allows the job, which ``--resources gpu=...`` and the profiles limit.

    Raises
    ------
    InputError
        If Snakemake allows, or this job sees, fewer GPUs than the config asks for.
    """
    visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not visible:
        log.info("no GPU is visible: training on the CPU, in one process")
        return 1
    if allowed < gpus:
        problem = f"{gpus} GPUs, but Snakemake may use only {allowed}"
        raise InputError("config: finetune.gpus", problem, f"Add --resources gpu={gpus}, or set it to {allowed}")
    if visible < gpus:
        problem = f"{gpus} GPUs, but this job sees only {visible}"
        raise InputError("config: finetune.gpus", problem, f"Set it to {visible}, or run where there are {gpus}")
    return gpus


def run_on_nodes(nodes: int, per_node: int, cpus: int) -> None:
    """Run this script again, ``per_node`` times on each of the nodes of a SLURM job, and wait until all have ended.

    Each process has ``cpus`` CPUs.

    In these processes, :func:`run_in_processes` calls its function, and ``job.find_process_number`` has their numbers.
    This process ends with the exit code of the first that fails. SIGTERM and SIGINT are passed on.

    Raises
    ------
    InputError
        If this is no SLURM job. If it has fewer nodes, srun says so.
    """
    # the only variable of SLURM that the executor plugin hands on to a job of several tasks
    if "SLURM_JOB_ID" not in os.environ:
        problem = f"{nodes} nodes, but this is no job of SLURM"
        raise InputError("config: finetune.nodes", problem, "Set it to 1, or run with --workflow-profile slurm")
    # a port that another job on the node hardly uses
    address = f"tcp://{socket.gethostname()}:{20_000 + int(os.environ['SLURM_JOB_ID']) % 10_000}"
    command = ["srun", f"--nodes={nodes}", f"--ntasks-per-node={per_node}", f"--cpus-per-task={cpus}"]
    command.append("--kill-on-bad-exit=1")
    log.info("training on %d nodes, with %d processes each", nodes, per_node)
    started = []
    with listen_for_signals(lambda: [one.terminate() for one in started]) as stop:
        again = [*command, sys.executable, *sys.argv]  # of this process
        started.append(subprocess.Popen(again, env=os.environ | {MEETING: address}))  # noqa: S603
        if stop.is_set():  # received before it was in the list
            started[0].terminate()
        code = started[0].wait()
    if code:
        sys.exit(TERMINATED if stop.is_set() else code)


def run_in_processes(function: Callable[..., None], size: int, *arguments: Any) -> None:
    """Call a function in ``size`` new processes, or in this process if ``size`` is 1 or srun started several.

    Each process has its own GPU, or an equal share of the CPU's threads. If one of them stops, all stop. SIGTERM and
    SIGINT are passed on to them; each then ends as it would alone, and this process with the exit code ``TERMINATED``.

    Parameters
    ----------
    function
        A function of a module, called with a :class:`Team` and the arguments.
    size
        Number of processes.
    arguments
        Must be picklable.
    """
    number = find_process_number()
    if number is not None:
        tasks, on_node = int(os.environ["SLURM_NTASKS"]), int(os.environ["SLURM_LOCALID"])
        with _meet(number, tasks, os.environ[MEETING], on_node) as team:
            function(team, *arguments)
        return
    if size == 1:
        function(ALONE, *arguments)
        return
    files = [
        handler.baseFilename for handler in logging.getLogger().handlers if isinstance(handler, logging.FileHandler)
    ]
    threads = max(1, torch.get_num_threads() // size)
    children = []

    def forward() -> None:
        for child in children:
            child.terminate()

    with tempfile.TemporaryDirectory() as folder, listen_for_signals(forward) as stop:
        address = Path(folder, "meeting").as_uri()
        context = spawn(_run, (function, size, address, threads, files, arguments), nprocs=size, join=False)
        children += context.processes
        if stop.is_set():  # received while the processes started
            forward()
        try:
            while not context.join():
                pass
        except (ProcessExitedException, ProcessRaisedException) as error:
            if stop.is_set():
                sys.exit(TERMINATED)
            if REPORTED in [child.exitcode for child in children]:  # the others fail because they miss this one
                sys.exit(1)
            if isinstance(error, ProcessExitedException):
                sys.exit(128 - error.exit_code if error.exit_code < 0 else error.exit_code)
            raise


def _run(
    rank: int, function: Callable[..., None], size: int, address: str, threads: int, files: list[str], arguments: tuple
) -> None:
    with suppress(AttributeError):  # on Linux: end with the parent, even if it is killed
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    handlers = [logging.StreamHandler(sys.stderr), *map(logging.FileHandler, files)]
    line = f"%(asctime)s process {rank}: %(message)s"
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.ERROR, handlers=handlers, format=line, datefmt="%H:%M:%S"
    )
    torch.set_num_threads(threads)
    try:
        with _meet(rank, size, address, rank) as team:
            function(team, *arguments)
    except Exception as raised:
        error = in_one_line(raised)
        if isinstance(error, InputError):
            log.error("%s", error)
            sys.exit(REPORTED)
        if isinstance(raised, RuntimeError):
            time.sleep(PATIENCE)  # if it is only that another process ended, the parent first sees how that one ended
        raise
    except KeyboardInterrupt:  # before the training listens for signals; torch would report success
        sys.exit(TERMINATED)


@contextmanager
def _meet(rank: int, size: int, address: str, on_node: int) -> Iterator[Team]:
    """Yield the team of this process, which is number ``on_node`` of its node, once all processes have met."""
    os.environ["LOCAL_RANK"] = str(on_node)
    if torch.cuda.is_available():
        torch.cuda.set_device(on_node)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    try:
        distributed.init_process_group(backend, init_method=address, rank=rank, world_size=size)
        yield Team(rank, size)
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()
