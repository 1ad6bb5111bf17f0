"""Ranks run on the GPUs that CUDA_VISIBLE_DEVICES leaves visible, and a wrong number is one line.

nvidia-smi is a stand-in, and so is the environment's Python, which notes where a rank would run instead of training.
"""

import os
import re
import shutil
import socket
import sys
from pathlib import Path

import pytest

from tests.helpers.tiny import ROOT, run

LISTED = """\
GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-3a5c0000-11)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-3a5d0000-12)
GPU 2: NVIDIA A100-SXM4-40GB (UUID: GPU-b7f10000-13)
GPU 3: NVIDIA A100-SXM4-40GB (UUID: GPU-c9000000-14)
  MIG 3g.20gb     Device  0: (UUID: MIG-e1aa-21)
  MIG 3g.20gb     Device  1: (UUID: MIG-f2bb-22)
"""
# Answers the check with the run's folder and leaves a finished run; everything else is Python's.
PYTHON = """\
#!/bin/bash
case "$*" in
    *"grow train"*" --check") echo {folder}/run ;;
    *"grow train"*)
        echo "$RANK $CUDA_VISIBLE_DEVICES" >>{folder}/ranks
        mkdir -p {folder}/run && touch {folder}/run/COMPLETE
        ;;
    *) exec {python} "$@" ;;
esac
"""
# Like DeepSpeed's launcher: devices by number from 0 on, so many as it is told.
LAUNCHER = """\
#!/bin/bash
while [[ $# != 0 && $1 != --no_python ]]; do [[ $1 != --num_accelerators ]] || number=$2; shift; done
for ((rank = 0; rank < number; rank++)); do
    RANK=$rank CUDA_VISIBLE_DEVICES=$(seq --separator=, 0 $((number - 1))) "${@:2}"
done
"""


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose bin/ comes first on the PATH and whose venv/ is the environment."""
    program(tmp_path / "bin" / "nvidia-smi", f"#!/bin/sh\necho '{LISTED}'\n")
    program(tmp_path / "venv" / "bin" / "python", PYTHON.format(folder=tmp_path, python=sys.executable))
    program(tmp_path / "venv" / "bin" / "grow", f'#!/bin/sh\nexec {tmp_path}/venv/bin/python -m grow "$@"\n')
    program(tmp_path / "venv" / "bin" / "deepspeed", LAUNCHER)
    (tmp_path / "venv" / "installed-requirements.txt").write_bytes((ROOT / "requirements.txt").read_bytes())
    for name in list(os.environ):
        if name.startswith("SLURM_"):
            monkeypatch.delenv(name)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return tmp_path


def train(machine: Path, code: int = 0, **environment: str) -> list[str]:
    """The ranks, each with what is visible to it; of a mistake its lines."""
    (machine / "ranks").write_text("")
    shutil.rmtree(machine / "run", ignore_errors=True)
    done = run("launch/train.sh", "r.yaml", code=code, **environment | {"VENV": str(machine / "venv")})
    return (machine / "ranks").read_text().splitlines() if code == 0 else done.stderr.splitlines()


@pytest.mark.parametrize(
    ("visible", "gpus"),
    [
        (None, 4),
        ("3,0,2", 3),
        ("1, 2", 2),
        ("0,7,1", 1),
        ("2,-1,3", 1),
        ("GPU-b7", 1),
        ("GPU-3a5d,GPU-c9000000-14", 2),
        ("GPU-3a5c,GPU-3", 1),
        ("MIG-f2", 1),
        ("", 0),
        ("-1", 0),
        ("4", 0),
        ("2,2", 0),
        ("GPU-3a5", 0),
        ("NoDevFiles", 0),
    ],
)
def test_visible_gpus_are_counted_as_cuda_does(machine: Path, visible: str | None, gpus: int) -> None:
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert int(run("bash", "-c", "source launch/common.sh; gpus", **environment).stdout) == gpus


@pytest.mark.parametrize(
    ("visible", "ranks"), [(None, 4), ("3,1", 2), ("GPU-b7,GPU-3a5d,GPU-c9", 3), ("MIG-f2", 1), ("", 1)]
)
def test_as_many_ranks_as_visible_gpus_and_on_those(machine: Path, visible: str | None, ranks: int) -> None:
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    seen = "0,1,2,3" if visible is None else visible
    assert train(machine, **environment) == [f"{rank} {seen}" for rank in range(ranks)]


@pytest.mark.full
def test_deepspeeds_own_launcher_leaves_them_their_gpus(machine: Path) -> None:
    (machine / "venv" / "bin" / "deepspeed").unlink()
    (machine / "venv" / "bin" / "deepspeed").symlink_to(Path(sys.prefix) / "bin" / "deepspeed")
    visible = "GPU-b7,GPU-3a5c"
    assert sorted(train(machine, CUDA_VISIBLE_DEVICES=visible, NPROC="2")) == [f"0 {visible}", f"1 {visible}"]


@pytest.mark.parametrize(
    ("environment", "names"),
    [
        ({"NPROC": "two"}, "NPROC=two"),
        ({"NPROC": "0"}, "NPROC=0"),
        ({"NPROC": "-1"}, "NPROC=-1"),
        ({"NPROC": "1.5"}, "NPROC=1.5"),
        ({"NPROC": "5"}, "NPROC=5"),
        ({"NPROC": "3", "CUDA_VISIBLE_DEVICES": "1,2"}, "NPROC=3"),
        ({"MASTER_PORT": "66000"}, "MASTER_PORT=66000"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT=http"),
        ({"RANK_WAIT": "soon"}, "RANK_WAIT=soon"),
        ({"CUDA_VISIBLE_DEVICES": "MIG-e1,MIG-f2"}, "CUDA_VISIBLE_DEVICES=MIG-e1,MIG-f2"),
        ({"HOSTFILE": "/nowhere/hosts"}, "HOSTFILE=/nowhere/hosts"),
    ],
)
def test_a_wrong_setting_is_one_line(machine: Path, environment: dict[str, str], names: str) -> None:
    (line,) = train(machine, code=2, **environment)
    assert line.startswith(f"train.sh: {names}: ")
    assert not (machine / "run").exists()


def test_a_port_that_is_taken(machine: Path) -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        (line,) = train(machine, code=2, MASTER_PORT=str(port))
    assert line.startswith(f"train.sh: MASTER_PORT={port}: ")
    assert train(machine, MASTER_PORT=str(port), NPROC="08", CUDA_VISIBLE_DEVICES="") == [f"{n} " for n in range(8)]


@pytest.mark.parametrize(
    ("script", "setting"),
    [("expand", "FACTOR=1"), ("expand", "FACTOR=wide"), ("consolidate", "ALPHA=1.2"), ("consolidate", "LIMIT=-5")],
)
def test_so_it_is_for_every_script(machine: Path, script: str, setting: str) -> None:
    said = run(f"launch/{script}.sh", "r.yaml", code=2, **dict([setting.split("=")])).stderr
    assert said.startswith(f"{script}.sh: {setting}: ") and said.count("\n") == 1


@pytest.mark.parametrize(
    "text", ["echo 'Unable to determine the device handle for GPU0000:01:00.0: Unknown Error'; exit 255", "exit 127"]
)
def test_an_error_of_nvidia_smi_is_no_gpu(machine: Path, text: str) -> None:
    program(machine / "bin" / "nvidia-smi", f"#!/bin/sh\n{text}\n")
    assert len(train(machine)) == 1
    assert len(train(machine, NPROC="2")) == 2, "without GPUs there are as many ranks as one asks for"


def test_an_nvidia_smi_that_hangs_is_not_waited_for(machine: Path) -> None:
    program(machine / "bin" / "nvidia-smi", "#!/bin/sh\nexec sleep 60\n")
    (line,) = train(machine, code=2, GPU_WAIT="1")
    assert "nvidia-smi does not answer" in line
    assert train(machine, GPU_WAIT="1", CUDA_VISIBLE_DEVICES="") == ["0 "], "who wants no GPU does not ask for them"


BAD_LINES = ("node1", "node1 slots=", "node1 slots=two", "node1 slots=0", "node[1-4] slots=8", "node1:8", "-v slots=1")


@pytest.mark.parametrize("line", [*BAD_LINES, "good slots=4"])
def test_a_bad_line_of_a_hostfile_is_named(machine: Path, line: str) -> None:
    hosts = machine / "hosts"
    hosts.write_text(f"# ours\n\ngood slots=2 # two of them\r\n{line}\n")
    (said,) = train(machine, code=2, HOSTFILE=str(hosts))
    assert said.startswith(f"train.sh: {hosts}, line 4: ")


def test_a_hostfile_of_this_machine_alone(machine: Path) -> None:
    hosts = machine / "hosts"
    hosts.write_text("localhost slots=2")
    assert train(machine, HOSTFILE=str(hosts), CUDA_VISIBLE_DEVICES="3,1") == ["0 3,1", "1 3,1"]
    hosts.write_text("# nobody\n")
    (said,) = train(machine, code=2, HOSTFILE=str(hosts))
    assert re.match(f"train.sh: {hosts}: no line such as", said)
