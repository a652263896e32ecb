"""A real SLURM on this machine: two nodes, the partitions `other`, `cpu` and `gpu`, and accounting.

A job without an account has the account `none`, and one without a partition the partition `other`. It needs root and
Debian's packages slurm-wlm, munge, slurmdbd and mariadb-server, which `make slurm` installs where it can. All files and
sockets are in one folder; a SLURM that is set up on the machine is not touched.
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

PROGRAMS = ("munged", "mariadbd", "mariadb-install-db", "slurmdbd", "slurmctld", "slurmd", "sbatch", "sacctmgr")
ACCOUNT = "biology"
# More than the machine has, so that the rules' requests can be met; the GPU is a file that torch does not take for one.
NODE = "CPUs=32 RealMemory=200000 Gres=gpu:1"

SLURM_CONF = """
ClusterName=local
SlurmctldHost=localhost
SlurmctldPort={ctld}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=10
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=localhost
AccountingStoragePort={dbd}
AccountingStoragePass={folder}/munge.socket
AccountingStoreFlags=job_comment
AccountingStorageEnforce=associations
JobAcctGatherType=jobacct_gather/linux
GresTypes=gpu
AccountingStorageTRES=gres/gpu
# a node that does not answer is down after 10 seconds, and jobs that exceed their time limit end at once
SlurmdTimeout=10
KillWait=20
OverTimeLimit=0
ReturnToService=2
SchedulerParameters=sched_interval=5,bf_interval=5
NodeName=first NodeHostname=localhost Port={first} {node}
NodeName=second NodeHostname=localhost Port={second} {node}
PartitionName=other Nodes=first,second Default=YES MaxTime=INFINITE State=UP
PartitionName=cpu Nodes=first,second MaxTime=INFINITE State=UP
PartitionName=gpu Nodes=first,second MaxTime=INFINITE State=UP
"""

SLURMDBD_CONF = """
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
DbdHost=localhost
DbdPort={dbd}
SlurmUser=root
PidFile={folder}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={database}
StorageUser=slurm
StorageLoc=slurm
"""


def missing():
    """Return why a real SLURM cannot run here, or None if it can."""
    absent = [name for name in PROGRAMS if not shutil.which(name)]
    if absent:
        return f"SLURM is not installed: no {', '.join(absent)}"
    return None if os.geteuid() == 0 else "starting SLURM needs root"


class Slurm:
    """The daemons of a SLURM in a new folder; a context manager that ends them.

    Parameters
    ----------
    folder
        Folder for configuration, sockets, logs and the database.
    """

    def __init__(self, folder):
        self.folder, self.daemons = Path(folder), {}
        self.environment = os.environ | {
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "PATH": f"{self.folder}/bin:{os.environ['PATH']}",
        }

    def __enter__(self):
        try:
            self._start_all()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        self._kill_jobs()
        for name in reversed(self.daemons):
            self.stop(name, signal.SIGTERM)

    def _start_all(self):
        for name in ("state", "spool-first", "spool-second", "database", "bin"):
            (self.folder / name).mkdir(parents=True)
        # the executor starts srun without SLURM_CONF
        srun = self.folder / "bin/srun"
        srun.write_text(f'#!/bin/sh\nSLURM_CONF={self.folder}/slurm.conf exec {shutil.which("srun")} "$@"\n')
        srun.chmod(0o755)
        ports = dict(zip(("ctld", "first", "second", "dbd", "database"), _free_ports(5), strict=True))
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        (self.folder / "slurm.conf").write_text(SLURM_CONF.format(folder=self.folder, node=NODE, **ports))
        (self.folder / "gres.conf").write_text("NodeName=first,second Name=gpu File=/dev/zero\n")
        (self.folder / "slurmdbd.conf").write_text(SLURMDBD_CONF.format(folder=self.folder, **ports))
        for file in (key, self.folder / "slurmdbd.conf"):
            file.chmod(0o600)
        files = [f"--{name}-file={self.folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
        self.start(
            "munged", "--foreground", "--force", "--num-threads=10", f"--socket={self.folder}/munge.socket", *files
        )
        self._start_database(ports["database"])
        self.start("slurmdbd", "-D")
        _wait(lambda: _listens(ports["dbd"]), "slurmdbd does not listen")  # slurmctld ends if it cannot reach it
        self.command("sacctmgr", "-i", "add", "cluster", "local")
        self.command("sacctmgr", "-i", "add", "account", f"none,{ACCOUNT}")
        self.command("sacctmgr", "-i", "add", "user", "root", f"account=none,{ACCOUNT}", "defaultaccount=none")
        self.start("slurmctld", "-D")
        _wait(lambda: _listens(ports["ctld"]), "slurmctld does not listen")
        self.start_node("first")

    def _start_database(self, port):
        data = f"--datadir={self.folder}/database"
        install = [
            "mariadb-install-db",
            "--no-defaults",
            "--user=root",
            "--auth-root-authentication-method=normal",
            data,
        ]
        subprocess.run(install, check=True, capture_output=True)
        files = [f"--socket={self.folder}/database.socket", f"--pid-file={self.folder}/database.pid"]
        self.start(
            "mariadbd", "--no-defaults", "--user=root", "--bind-address=127.0.0.1", f"--port={port}", data, *files
        )
        _wait((self.folder / "database.socket").exists, "the database does not start")
        grant = "CREATE USER slurm@127.0.0.1; GRANT ALL ON slurm.* TO slurm@127.0.0.1; CREATE DATABASE slurm;"
        self.command("mariadb", "--no-defaults", f"--socket={self.folder}/database.socket", "--execute", grant)

    def start(self, name, *arguments):
        """Start a daemon; its messages are in `{name}.out`."""
        with (self.folder / f"{name}.out").open("a") as out:
            self.daemons[" ".join((name, *arguments))] = subprocess.Popen(
                [shutil.which(name), *arguments], env=self.environment, stdout=out, stderr=out, start_new_session=True
            )

    def stop(self, name, number=signal.SIGKILL):
        """End a daemon by a signal."""
        self.daemons[name].send_signal(number)
        try:
            self.daemons[name].wait(20)
        except subprocess.TimeoutExpired:
            self.daemons[name].kill()
            self.daemons[name].wait()

    def start_node(self, name):
        """Start a node's daemon, and wait until SLURM uses the node."""
        self.start("slurmd", "-D", "-N", name)
        _wait(lambda: self.state_of(name) in {"idle", "mixed"}, f"the node {name} does not start")

    def state_of(self, node):
        """Return the state of a node, such as idle."""
        return self.command("sinfo", "-h", "-N", "-n", node, "-p", "cpu", "-o", "%T").strip()

    def command(self, *arguments):
        """Run a program with this SLURM's configuration, and return its output."""
        run = subprocess.run(arguments, env=self.environment, capture_output=True, text=True)
        assert run.returncode == 0, f"{arguments}: {run.stderr}"
        return run.stdout

    def lose_node(self, name):
        """End a node's daemon and all processes of all jobs at once, as if it lost power."""
        self.stop(f"slurmd -D -N {name}")
        self._kill_jobs()

    def _kill_jobs(self):
        for process, name, environment in self._processes():
            if name == "slurmstepd" or "SLURM_JOB_ID" in environment:
                _signal(process, signal.SIGKILL)

    def signal_script(self, job, script, number):
        """Send a signal to the process of a job that runs a rule's script."""
        for process, _, environment in self._processes():
            if environment.get("SLURM_JOB_ID") == job and script in Path(f"/proc/{process}/cmdline").read_text():
                _signal(process, number)

    def _processes(self):
        """Return id, name and environment of all processes that belong to this SLURM."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                pairs = (process / "environ").read_bytes().decode(errors="replace").split("\0")
                environment = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
                if environment.get("SLURM_CONF") == self.environment["SLURM_CONF"]:
                    found.append((int(process.name), (process / "comm").read_text().strip(), environment))
            except (OSError, ValueError):
                continue  # it has ended
        return found

    def jobs(self):
        """Return the jobs so far, one row for each time that a job was started or requeued."""
        columns = ("JobID", "Comment", "Partition", "Account", "State", "ElapsedRaw", "Timelimit", "ReqTRES")
        listed = self.command("sacct", "-X", "-n", "-P", "-D", "-a", "-o", ",".join(columns))
        return [dict(zip(columns, line.split("|"), strict=True)) for line in listed.splitlines()]


def _signal(process, number):
    with suppress(ProcessLookupError):  # it has ended
        os.kill(process, number)


def _free_ports(number):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    try:
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def _listens(port):
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


def _wait(condition, problem, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, problem
        time.sleep(0.2)
