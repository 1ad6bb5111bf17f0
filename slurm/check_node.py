"""Are all nodes fit for a run? One rank of srun each; one line on stderr for every node that is not, and exit code 2.

    srun launch/rank.sh python slurm/check_node.py FOLDER CHECKPOINT

FOLDER is where checkpoints will be written, CHECKPOINT what training starts from. MIN_FREE_GB (20) must be free there,
and all ranks must find each other in CHECK_TIMEOUT (30) seconds.
"""

import os
import shutil
import socket
import sys
import threading
from datetime import timedelta
from pathlib import Path

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # one line is wanted, not a stack of C++ for every retry

import torch
import torch.distributed as dist

TIMEOUT = timedelta(seconds=int(os.environ.get("CHECK_TIMEOUT", "30")))
RANK, WORLD, LOCAL_RANK = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
MASTER, PORT = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])


def local_problem(folder: Path, checkpoint: str) -> str | None:
    """What is wrong with this node by itself."""
    least = float(os.environ.get("MIN_FREE_GB", "20"))
    ranks = int(os.environ.get("SLURM_NTASKS_PER_NODE", "1").split("(")[0])
    gpus = torch.cuda.device_count()
    if shutil.which("nvidia-smi") and gpus < ranks:
        return f"{gpus} GPUs can be used by torch, for {ranks} ranks"
    if checkpoint.startswith((".", "/")) and not Path(checkpoint).is_dir():
        return f"{checkpoint} cannot be seen from here; it must be on a file system that all nodes share"
    if not os.access(folder, os.W_OK):
        return f"{folder} cannot be written"
    free = shutil.disk_usage(folder).free / 1e9
    if free < least:
        return f"{free:.1f} GB free in {folder}, {least:g} are wanted (MIN_FREE_GB)"
    return None


def join() -> torch.device:
    """Meets the other ranks. Raises UserWarning, with one line, if that fails."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", LOCAL_RANK) if cuda else torch.device("cpu")
    try:
        store = dist.TCPStore(MASTER, PORT, WORLD, RANK == 0, TIMEOUT, wait_for_workers=False)
        store.add("here", 1)
    except (dist.DistError, RuntimeError):
        raise UserWarning(f"cannot reach the first node at {MASTER}:{PORT}") from None
    try:
        dist.init_process_group(
            "nccl" if cuda else "gloo", store=store, rank=RANK, world_size=WORLD, timeout=TIMEOUT,
            device_id=device if cuda else None,
        )  # fmt: skip
    except (dist.DistError, RuntimeError):
        come = f"; {store.add('here', 0)} of {WORLD} ranks came to the first node" if RANK == 0 else ""
        raise UserWarning(f"cannot join the other ranks{come}") from None
    return device


def joint_problem(bad: bool) -> tuple[str | None, bool]:
    """What is wrong between the nodes, and whether any rank has found something wrong: then all leave at once."""
    try:
        # The first sums up to the number of ranks, the second to that of the bad ones.
        total = torch.tensor([1.0, float(bad)], device=join())
        dist.all_reduce(total)
        good_sum, found = total[0].item() == WORLD, total[1].item()
        dist.barrier()
    except UserWarning as problem:
        return str(problem), True
    except (dist.DistError, RuntimeError) as error:
        return f"the all-reduce failed ({str(error).splitlines()[0]})", True
    return (None if good_sum else f"the all-reduce of {WORLD} ones is {total[0].item():g}"), bool(found)


def leave(problem: str | None, code: int) -> None:
    """Says what is wrong and ends the process, without the destructors of a group whose other ranks may be gone."""
    if problem and LOCAL_RANK == 0:  # all ranks of a node find the same
        print(f"{os.environ.get('SLURMD_NODENAME', socket.gethostname())}: {problem}", file=sys.stderr, flush=True)
    os._exit(code)


def main() -> None:
    """Checks and leaves: 0 if all is well, 2 if not."""
    folder, checkpoint = sys.argv[1:]
    problem = local_problem(Path(folder), checkpoint)
    # torch tries to connect for longer than it is told to where packets are dropped without a word.
    silent = problem or f"cannot reach the first node at {MASTER}:{PORT}, or not all ranks came"
    watchdog = threading.Timer(TIMEOUT.seconds + 5, leave, (silent, 2))
    watchdog.daemon = True
    watchdog.start()
    between, found = joint_problem(problem is not None)
    problem = problem or between
    leave(problem, 2 if problem or found else 0)


if __name__ == "__main__":
    main()
