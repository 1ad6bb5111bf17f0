"""What a cluster does on a bad day: a controller that does not answer, hosts with other variables, two installations.

Slurm's programs, ssh, pdsh and pip are stand-ins; the scripts are real, and so is DeepSpeed's launcher.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.tiny import ROOT, run
from tests.launch.test_gpus import machine as machine
from tests.launch.test_gpus import program, train

# The controller answers when as many questions as DEAF have had no answer; it knows the jobs of the file `jobs`, a line
# "JOB STATE" for each.
CONTROLLER = """\
#!/bin/bash
cd {folder}
n=$(cat asked 2>/dev/null || echo 0)
echo $((n + 1)) >asked
if ((n < DEAF)); then
    case $HOW in
        fails) echo "slurm_load_jobs error: Unable to contact slurm controller (connect failure)" >&2; exit 1 ;;
        silent) exit 0 ;;
    esac
fi
case "$*" in
    *requeue*) echo "$*" >>requeued; exit ;;
    *hostnames*) echo node1; exit ;;
    *"show node"*) echo "NodeName=node1 NodeAddr=127.0.0.1"; exit ;;
esac
while read -r job state; do
    [[ " ${{*//[=,]/ }} " == *" $job "* ]] || continue
    if [[ $0 == *squeue ]]; then
        [[ $state != RUNNING ]] || echo RUNNING
    else
        echo "JobId=$job JobName=x JobState=$state Requeue=1 NodeList=node1 NumNodes=1"
    fi
    exit
done <jobs
echo "slurm_load_jobs error: Invalid job id specified" >&2
exit 1
"""


@pytest.fixture
def slurm(machine: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a machine with Slurm's stand-ins on it, in the job 7."""
    for name in ("scontrol", "squeue"):
        program(machine / "bin" / name, CONTROLLER.format(folder=machine))
    program(machine / "bin" / "sleep", "#!/bin/sh\n")
    program(machine / "bin" / "srun", f'#!/bin/bash\nprintf "%s\\n" "$@" >{machine}/srun\nmkdir -p {machine}/run\n'
            f"touch {machine}/run/COMPLETE\n")  # fmt: skip
    (machine / "jobs").write_text("7 RUNNING\n")
    for name, value in (("DEAF", "0"), ("HOW", "fails"), ("SLURM_JOB_ID", "7")):
        monkeypatch.setenv(name, value)
    return machine


def shell(text: str, code: int = 0, **environment: str) -> str:
    """What a script that has read slurm/common.sh says."""
    return run("bash", "-c", f"set -euo pipefail; ROOT={ROOT}; source slurm/common.sh\n{text}", code=code,
               **environment).stderr  # fmt: skip


@pytest.mark.parametrize("how", ["fails", "silent"])
def test_a_controller_that_does_not_answer_ends_no_claim(slurm: Path, how: str) -> None:
    claim = slurm / "run.job"
    claim.symlink_to("3")
    (slurm / "jobs").write_text("3 RUNNING\n7 RUNNING\n")
    said = shell(f"claim {slurm}/run", code=1, DEAF="1000000", HOW=how)
    assert "does not say whether job 3" in said and os.readlink(claim) == "3"
    (slurm / "asked").unlink()
    assert "job 3 works on" in shell(f"claim {slurm}/run; echo mine >&2", DEAF="5", HOW=how)
    assert os.readlink(claim) == "3"


@pytest.mark.parametrize("jobs", ["7 RUNNING\n", "3 TIMEOUT\n7 RUNNING\n", "33 RUNNING\n3 CANCELLED\n7 RUNNING\n"])
def test_a_job_that_is_over_holds_no_run(slurm: Path, jobs: str) -> None:
    claim = slurm / "run.job"
    claim.symlink_to("3")
    (slurm / "jobs").write_text(jobs)
    shell(f"claim {slurm}/run", DEAF="3")
    assert os.readlink(claim) == "7"


@pytest.mark.parametrize(("state", "deaf", "requeued"), [("RUNNING", "5", True), ("COMPLETING", "4", False)])
def test_a_job_is_requeued_once_the_controller_answers(slurm: Path, state: str, deaf: str, requeued: bool) -> None:
    (slurm / "jobs").write_text(f"7 {state}\n")
    shell("again 'asked to leave'", code=75, DEAF=deaf)
    assert (slurm / "requeued").exists() == requeued


def test_the_ranks_of_a_job_get_its_variables(slurm: Path) -> None:
    """And all of site.env, exported or not, a VENV among it, although the job was submitted with --export=NONE."""
    (slurm / "site.env").write_text(f"VENV={slurm}/venv\nMY_DATA='a place'\n: $UNKNOWN_TO_MODULES\n")
    said = shell('site_settings; step 1 1 true; printenv VENV MY_DATA >&2', SITE_ENV=str(slurm / "site.env"),
                 SLURM_EXPORT_ENV="NONE", VENV="")  # fmt: skip
    assert said.splitlines() == [f"{slurm}/venv", "a place"]
    assert "--export=ALL" in (slurm / "srun").read_text().splitlines()


def test_jobs_get_what_their_script_was_told(slurm: Path) -> None:
    """By name, since a value may have commas in it."""
    text = 'options=(--nodes=1); hand_settings_on; echo "${options[*]}" >&2'
    assert shell(text, LAYERS="0,2").strip() == "--nodes=1"
    given = shell(text, LAYERS="0,2", SBATCH_EXPORT="NONE").strip().partition("--export=")[2].split(",")
    assert "LAYERS" in given and not any("=" in name for name in given)


@pytest.mark.parametrize(
    ("environment", "absent", "line"),
    [
        ({"SLURM_JOB_ID": "6"}, (), "SLURM_JOB_ID=6: this job is over"),
        ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_ID": "0"}, (), "this is one of 8 tasks of srun"),
        ({"SLURM_JOB_NUM_NODES": "2"}, ("srun",), "SLURM_JOB_ID=7: srun is not here"),
    ],
)  # fmt: skip
def test_an_allocation_that_is_none_is_one_line(
    slurm: Path, environment: dict[str, str], absent: tuple[str, ...], line: str
) -> None:
    path = without_slurm(slurm, absent)
    (said,) = train(slurm, code=2, PATH=path, **environment)
    assert said.startswith(f"train.sh: {line}")


def test_an_allocation_whose_variables_are_missing(slurm: Path) -> None:
    train(slurm)
    words = (slurm / "srun").read_text().splitlines()
    assert {"--nodes=1", "--ntasks=1", "--overlap"} <= set(words)


def test_a_job_number_without_slurm_is_left_over(slurm: Path) -> None:
    assert train(slurm, PATH=without_slurm(slurm, ("srun",)), CUDA_VISIBLE_DEVICES="2,1") == ["0 2,1", "1 2,1"]


def without_slurm(slurm: Path, absent: tuple[str, ...]) -> str:
    """A PATH without these programs, whether Slurm is installed on this machine or not."""
    if not absent:
        return os.environ["PATH"]
    for name in absent:
        (slurm / "bin" / name).unlink()
    (slurm / "usr").mkdir()
    for file in Path("/usr/bin").iterdir():
        if file.name not in absent:
            (slurm / "usr" / file.name).symlink_to(file)
    return f"{slurm}/bin:{slurm}/usr"


# Runs what follows the host with a shell of this machine, as a login there would: with nothing of this shell.
ELSEWHERE = """\
#!/bin/bash
host=node5
while [[ ${1-} == -* ]]; do
    case $1 in -o | -f) shift ;; -w) host=$2; shift ;; esac
    shift
done
[[ ${0##*/} == pdsh ]] || { host=$1; shift; }
[[ $host == node5 ]] || exit 255
[[ $* != "hostname -I" ]] || { echo 127.0.0.1; exit; }
words=${*//%n/0}
exec env -i HOME="$HOME" PATH=/usr/bin:/bin bash -c "${words//%h/$host}"
"""


def test_a_host_gets_the_variables_and_the_words_as_they_are(machine: Path) -> None:
    for name in ("ssh", "pdsh"):
        program(machine / "bin" / name, ELSEWHERE)
    note = "import json, os, sys; print(json.dumps([sys.argv[1:], dict(os.environ)]))"
    (machine / "note.py").write_text(note)
    python = program(machine / "venv" / "bin" / "python", (machine / "venv" / "bin" / "python").read_text().replace(
        'echo "$RANK $CUDA_VISIBLE_DEVICES" >>', f'{sys.executable} {machine}/note.py "$@" >>'))  # fmt: skip
    (machine / "venv" / "bin" / "deepspeed").unlink()
    (machine / "venv" / "bin" / "deepspeed").symlink_to(Path(sys.prefix) / "bin" / "deepspeed")
    (machine / "hosts").write_text("node5 slots=1\n")
    own = machine / "home" / ".deepspeed_env"
    own.parent.mkdir()
    own.write_text("NCCL_DEBUG=WARN\n")
    words = ["--prompt", 'it\'s "5 %h" `id` $HOME\n\\n {question} → ü', "--completion", "", "--x", "* ~ ; exit 3 #"]
    given = {
        "HF_HOME": "/a place/hub", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "3", "NCCL_IB_HCA": '=mlx5_0:1"$x',
        "MY_ROWS": "two\nlines and a 'quote'", "PYTHONPATH": f"{ROOT}:/it's", "HOME": str(own.parent),
        "NCCL_DEBUG": "INFO", "HF_TOKEN": "hf_secret", "CUDA_VISIBLE_DEVICES": "3",
    }  # fmt: skip
    (machine / "ranks").write_text("")
    given["VENV"] = str(python.parent.parent)
    run("launch/train.sh", "r.yaml", *words, HOSTFILE=str(machine / "hosts"), **given)
    (rank,) = (machine / "ranks").read_text().splitlines()
    arguments, environment = json.loads(rank)
    assert arguments == ["-m", "grow", "train", "r.yaml", *words]
    own_of_the_host = {"HF_TOKEN": None, "CUDA_VISIBLE_DEVICES": "0", "NCCL_DEBUG": "WARN"}
    for name, value in (given | own_of_the_host | {"RANK": "0", "WORLD_SIZE": "1", "PWD": str(ROOT)}).items():
        assert environment.get(name) == value, name
    assert own.read_text() == "NCCL_DEBUG=WARN\n"


@pytest.mark.parametrize(
    ("hosts", "file", "line"),
    [
        ("node5 slots=1\nnode6 slots=1\n", "", "node6 cannot be reached"),
        ("node5 slots=1\n", "A=1\n\nB=2\n", "is not like NAME=VALUE"),
    ],
)
def test_a_host_that_cannot_be_used_is_one_line(machine: Path, hosts: str, file: str, line: str) -> None:
    for name in ("ssh", "pdsh"):
        program(machine / "bin" / name, ELSEWHERE)
    (machine / "hosts").write_text(hosts)
    (machine / ".deepspeed_env").write_text(file)
    (said,) = train(machine, code=2, HOSTFILE=str(machine / "hosts"), HOME=str(machine))
    assert line in said


# A Python that makes environments whose pip is slow and writes down when it starts and ends. Once the project is
# installed, which is quick, their Python knows where it is.
MAKES = """\
#!/bin/bash
[[ $1 != -c ]] || exit 0
mkdir -p "$3/bin" && touch "$3/pyvenv.cfg"
echo '#!/bin/sh' >"$3/bin/python"
cat >"$3/bin/pip" <<'END'
#!/bin/bash
bin=${{0%/*}}
[[ $* != *--editable* ]] || {{ echo "echo {root}/grow/__init__.py" >>"$bin/python"; ln -sf python "$bin/grow"; exit; }}
echo start >>{folder}/pip; /bin/sleep 0.3; echo end >>{folder}/pip
END
chmod +x "$3"/bin/*
"""


def installing(machine: Path) -> subprocess.Popen[str]:
    python = program(machine / "bin" / "python3.12", MAKES.format(folder=machine, root=ROOT))
    variables = os.environ | {"PYTHON": str(python), "VENV": str(machine / "new")}
    text = f"set -euo pipefail; source {ROOT}/launch/common.sh; install requirements.txt"
    return subprocess.Popen(
        ["bash", "-c", text], cwd=ROOT, env=variables, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def test_of_two_installations_at_once_one_is_made(machine: Path) -> None:
    both = [installing(machine), installing(machine)]
    said = [process.communicate()[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert (machine / "pip").read_text() == "start\nend\n"


def test_an_installation_that_was_killed_is_made_anew(machine: Path) -> None:
    first = installing(machine)
    while not (machine / "pip").exists():
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    (machine / "new" / "half").touch()
    again = installing(machine)
    assert again.communicate()[1].count("installing") == 1 and again.returncode == 0
    assert not (machine / "new" / "half").exists()
    assert (machine / "pip").read_text() == "start\nstart\nend\n"


def test_what_was_there_before_stays(machine: Path) -> None:
    (machine / "new").mkdir()
    (machine / "new" / "mine").touch()
    for _ in range(2):
        process = installing(machine)
        assert process.communicate() and process.returncode == 0
        (machine / "new" / "installed-requirements.txt").write_text("others\n")
    assert (machine / "new" / "mine").exists()
