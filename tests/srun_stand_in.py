"""Stands in for srun: starts processes on this machine as if each were on a node of its own, and ends with them."""

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = f"""#!{sys.executable}
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from srun_stand_in import main
sys.exit(main(sys.argv[1:]))
"""


def put_in_path(folder):
    """Write the program into a folder; return the environment in which the executor plugin starts a SLURM job."""
    folder.mkdir()
    program = folder / "srun"
    program.write_text(PROGRAM)
    program.chmod(0o755)
    # a job of its own, so that tests that run side by side do not meet
    return os.environ | {"SLURM_JOB_ID": str(os.getpid()), "PATH": f"{folder}:{os.environ['PATH']}"}


def main(arguments):
    options = dict(one.split("=") for one in arguments if one.startswith("--"))
    command = arguments[len(options) :]
    assert options.pop("--kill-on-bad-exit") == "1" and set(options) == {
        "--nodes",
        "--ntasks-per-node",
        "--cpus-per-task",
    }
    per_node = int(options["--ntasks-per-node"])
    tasks = int(options["--nodes"]) * per_node
    numbers = [
        {"SLURM_PROCID": str(one), "SLURM_NTASKS": str(tasks), "SLURM_LOCALID": str(one % per_node)}
        for one in range(tasks)
    ]
    running = [subprocess.Popen(command, env=os.environ | number) for number in numbers]
    while running:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)  # one has ended
        for process in [one for one in running if one.poll() is not None]:
            running.remove(process)
            if process.returncode:
                for other in running:
                    other.kill()
                return process.returncode
    return 0
