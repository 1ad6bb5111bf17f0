"""Are all nodes fit for a run? One rank of srun each; one line on stderr for every node that is not.

    srun launch/rank.sh python slurm/check_node.py FOLDER CHECKPOINT

FOLDER is where checkpoints will be written, CHECKPOINT what training starts from. MIN_FREE_GB (20) must be free.
"""

import os
import shutil
import socket
import sys
from datetime import timedelta
from pathlib import Path

TIMEOUT = timedelta(seconds=int(os.environ.get("CHECK_TIMEOUT", "40")))


def local_problem(folder: Path, checkpoint: str) -> str | None:
    """What is wrong with this node by itself."""
    import torch

    least = float(os.environ.get("MIN_FREE_GB", "20"))
    tasks = int(os.environ.get("SLURM_NTASKS_PER_NODE", "1").split("(")[0])
    gpus = torch.cuda.device_count()
    if shutil.which("nvidia-smi") and gpus < tasks:
        return f"{gpus} GPUs can be used by torch, for {tasks} ranks"
    if checkpoint.startswith(("/", "./", "../")) and not Path(checkpoint).is_dir():
        return f"{checkpoint} cannot be seen from here; it must be on a file system that all nodes share"
    if not os.access(folder, os.W_OK):
        return f"{folder} cannot be written"
    free = shutil.disk_usage(folder).free / 1e9
    if free < least:
        return f"{free:.1f} GB free in {folder}, at least {least:g} are wanted (MIN_FREE_GB)"
    return None


def joint_problem() -> str | None:
    """What is wrong between the nodes: ranks that do not come, sums that do not come out."""
    import torch
    import torch.distributed as dist

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    master = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    try:
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), world, rank == 0, TIMEOUT, False
        )
        store.add("here", 1)
    except (dist.DistError, RuntimeError):
        return f"cannot reach the first node, {master}"
    try:
        dist.init_process_group(
            "nccl" if cuda else "gloo", store=store, rank=rank, world_size=world, timeout=TIMEOUT,
            device_id=device if cuda else None,
        )  # fmt: skip
        total = torch.ones(1024, device=device)
        dist.all_reduce(total)
        if total[0].item() != world:
            return f"the all-reduce of {world} ranks is {total[0].item():g}"
        dist.barrier()
        dist.destroy_process_group()
    except (dist.DistError, RuntimeError) as error:
        if rank == 0:
            come = store.add("here", 0)
            return f"{come} of {world} ranks came to {master} in {TIMEOUT.seconds} s ({str(error).splitlines()[0]})"
    return None


def main() -> int:
    """Checks; 0 if all is well, 1 if not."""
    folder, checkpoint = sys.argv[1:]
    problem = local_problem(Path(folder), checkpoint) or joint_problem()
    if problem:
        node = os.environ.get("SLURMD_NODENAME", socket.gethostname())
        # All ranks of a node find the same; one says it.
        if os.environ["LOCAL_RANK"] == "0":
            print(f"{node}: {problem}", file=sys.stderr)
    return 1 if problem else 0


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)  # without the destructors of a process group whose other ranks may be gone
