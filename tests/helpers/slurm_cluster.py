"""A real Slurm of two virtual nodes on this machine: its daemons, started and stopped by the tests.

No systemd, no cgroups, no database; everything it writes is in one folder. It needs root, and Debian's slurm-wlm,
slurm-client and munge (launch/test.sh installs them where it may).
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from tests.helpers.tiny import ROOT, free_ports

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")

# Both nodes have ports of their own on the loopback address, by which ranks find each other. A job that is requeued
# waits until the credentials of its last start have expired: two minutes, unless told otherwise.
SLURM_CONF = """\
ClusterName=virtual
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
GresTypes=gpu
MinJobAge=3600
KillWait=10
SchedulerParameters=batch_sched_delay=0,sched_interval=2
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=8000 Gres=gpu:2
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=8000 Gres=gpu:2
PartitionName=all Nodes=node1,node2 Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""


def missing() -> str | None:
    """Why there can be no Slurm here, or None."""
    if os.geteuid() != 0:
        return "only root can start Slurm's daemons"
    absent = [program for program in PROGRAMS if not find(program)]
    return f"{', '.join(absent)} not installed (launch/test.sh installs Slurm as root on Debian)" if absent else None


def find(program: str) -> str | None:
    """Where one of Slurm's programs is."""
    return shutil.which(program, path=_path())


class Cluster:
    """The running daemons, and what tests ask of them. Jobs see the variables in `environment` and no others'."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": _path()}
        self._daemons: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        host = socket.gethostname().split(".")[0]
        (self.folder / "state").mkdir()
        (self.folder / "slurm.conf").write_text(SLURM_CONF.format(host=host, folder=self.folder, ports=free_ports(3)))
        for number in (0, 1):  # Slurm wants devices; nothing opens these
            os.mknod(self.folder / f"gpu{number}", 0o666 | 0o020000, os.makedev(1, 3))
        (self.folder / "gres.conf").write_text(
            f"AutoDetect=off\nNodeName=node[1-2] Name=gpu File={self.folder}/gpu[0-1]\n"
        )
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        files = {"socket": "socket", "key-file": "key", "log-file": "log", "pid-file": "pid", "seed-file": "seed"}
        places = [f"--{option}={self.folder}/munge.{name}" for option, name in files.items()]
        self._daemon("munged", "--foreground", "--force", *places)
        wait_for((self.folder / "munge.socket").exists, 10, "munged")
        self._daemon("slurmctld", "-D")
        for node in ("node1", "node2"):
            self.start_node(node)
        wait_for(lambda: self.nodes().count("idle") == 2, 60, "idle nodes")

    def start_node(self, node: str) -> None:
        self._daemon("slurmd", "-D", "-N", node)

    def stop(self) -> None:
        """Ends every job, then the daemons."""
        for signal_ in ((), ("--signal=KILL", "--full")):
            subprocess.run(["scancel", "--user=root", *signal_], env=self.environment, capture_output=True)
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in self._daemons:
            try:
                daemon.wait(15)
            except subprocess.TimeoutExpired:
                daemon.kill()

    def ask(self, *command: str | Path, code: int = 0, cwd: Path = ROOT, **environment: str) -> str:
        """Runs a client of Slurm; returns what it printed."""
        done = subprocess.run(
            [str(part) for part in command], env=self.environment | environment, capture_output=True, text=True,
            cwd=cwd, timeout=60,
        )  # fmt: skip
        assert done.returncode == code, f"{command}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def nodes(self) -> list[str]:
        """The state of each node."""
        done = subprocess.run(
            ["sinfo", "--noheader", "--Node", "--format=%t"], env=self.environment, capture_output=True, text=True
        )
        return done.stdout.split()

    def field(self, job: str, name: str) -> str:
        """A field of `scontrol show job`, such as JobState."""
        shown = self.ask("scontrol", "show", "job", job)
        return next(word.split("=", 1)[1] for word in shown.split() if word.startswith(name + "="))

    def ranks(self, job: str) -> list[int]:
        """The training processes of a job, all of which run on this machine."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                variables = set((process / "environ").read_bytes().split(b"\0"))
                words = (process / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue  # it is over
            ours = {f"SLURM_JOB_ID={job}".encode(), f"SLURM_CONF={self.folder}/slurm.conf".encode()} <= variables
            command = [Path(os.fsdecode(word)).name for word in words[1:3]]
            if ours and command == ["grow", "train"] and b"RANK=" in {v[:5] for v in variables}:
                found.append(int(process.name))
        return found

    def finish(self, job: str, seconds: float = 300) -> str:
        """Waits until a job is over for good. Returns its state."""
        # Not NODE_FAIL: for some seconds that is the state of a job that Slurm is about to requeue.
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "DEADLINE", "PREEMPTED")
        wait_for(lambda: self.field(job, "JobState") in over, seconds, f"job {job}")
        return self.field(job, "JobState")

    def _daemon(self, *command: str) -> None:
        log = (self.folder / f"{command[0]}.out").open("ab")
        self._daemons.append(
            subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, start_new_session=True)
        )


def wait_for(true: Callable[[], object], seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(0.25)


def _path() -> str:
    return os.environ["PATH"] + ":/usr/sbin:/sbin"
