"""Jobs on a real Slurm of two virtual nodes with two ranks each, from a clean clone, whatever disturbs them."""

import json
import os
import re
import shlex
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import transformers

from tests.helpers import slurm_cluster
from tests.helpers.slurm_cluster import Cluster, wait_for
from tests.helpers.tiny import clone, environment, file_checksum, grow, make_base, make_data, make_recipe, step_lines

pytestmark = pytest.mark.skipif(bool(slurm_cluster.missing()), reason=f"no Slurm: {slurm_cluster.missing()}")

STEPS, SAVE = 40, 5
# What the virtual nodes have; on a cluster the #SBATCH lines stand.
NODES = ("--ntasks-per-node=2", "--gpus-per-node=2", "--output=%x-%j.out")


QUICK = {"SKIP_CHECK": "1", "SCORES": "none"}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


class Site:
    """A clean clone of the repository, under a path with a space, and what recipes need."""

    variables = MappingProxyType({"PYTHONUNBUFFERED": "1", "LIMIT": "4", "MIN_FREE_GB": "0.01", "RANK_WAIT": "5"})

    def __init__(self, folder: Path, cluster: Cluster):
        self.folder, self.cluster = folder, cluster
        self.clone = clone(folder / "a clone")
        self.variables = MappingProxyType(self.variables | {"VENV": str(environment(self.clone))})
        # For jobs that are submitted without variables; those of others come first.
        lines = (f"{name}=${{{name}-{shlex.quote(value)}}}\n" for name, value in self.variables.items())
        (self.clone / "slurm" / "site.env").write_text("".join(lines))
        self.bases = {kind: make_base(folder / kind, kind) for kind in ("text", "multimodal")}
        self.data = make_data(folder / "data")

    def recipe(self, folder: Path, kind: str = "multimodal", grown: str = "", **fields: Any) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        places = {"base": self.bases[kind], "grown": Path(grown or self.folder / f"{kind}-grown"), "data": self.data}
        more = {"max_steps": STEPS, "save_steps": SAVE, "eval_steps": 50, "learning_rate": 1e-3, "report_to": "none",
                "dtype": "float32"}  # fmt: skip
        return make_recipe(folder / "recipe.yaml", stage=2, **(places | more | fields))

    def submit(self, script: str, *arguments: str | Path, options: tuple[str, ...] = (), **environment: str) -> str:
        # Each job's log lands in the clone, from where it is submitted.
        command = ["sbatch", "--parsable", f"--chdir={self.clone}", *NODES, *options, script, *arguments]
        return self.cluster.ask(*command, cwd=self.clone, **(self.variables | environment)).strip()

    def log(self, job: str) -> str:
        (path,) = self.clone.glob(f"*-{job}.out")
        return path.read_text(errors="replace")

    def steps(self, job: str) -> int:
        """How many steps are in the log of a job: those done again count again."""
        return len(step_lines(self.log(job))) if list(self.clone.glob(f"*-{job}.out")) else 0


@pytest.fixture(scope="module")
def site(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Site:
    return Site(tmp_path_factory.mktemp("site"), cluster)


def losses(run: Path) -> list[float]:
    history = json.loads((run / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def weights(stock: Path) -> dict[str, str]:
    return {file.name: file_checksum(file) for file in stock.glob("*.safetensors")}


@pytest.fixture(scope="module")
def undisturbed(site: Site, cluster: Cluster) -> Path:
    """The run of a job that nothing disturbs, and whose variables are all from slurm/site.env."""
    path = site.recipe(site.folder / "undisturbed")
    job = site.submit("slurm/grow_gemma4b.sh", path, options=("--export=NONE",))
    assert cluster.finish(job) == "COMPLETED", site.log(job)
    return path.parent / "run"


def test_a_job_ends_with_a_stock_checkpoint(site: Site, undisturbed: Path, tmp_path: Path) -> None:
    _, info = transformers.Gemma3ForConditionalGeneration.from_pretrained(
        f"{undisturbed}-stock", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert json.loads(Path(f"{undisturbed}-scores.json").read_text())["task"]["rows"] == 4
    alone = site.recipe(tmp_path)
    grow("train", alone)
    assert losses(undisturbed) == pytest.approx(losses(tmp_path / "run"), abs=1e-3)


def time_limit(cluster: Cluster, site: Site, job: str) -> None:
    """The ranks stand still until the limit is near."""
    for rank in cluster.ranks(job):
        os.kill(rank, signal.SIGSTOP)
    wait_for(lambda: "preempted (USR1)" in site.log(job), 180, "the signal before the time limit")
    for rank in cluster.ranks(job):
        os.kill(rank, signal.SIGCONT)


def signal_to_the_steps(cluster: Cluster, site: Site, job: str) -> None:
    cluster.ask("scancel", "--signal=USR1", job)


def requeue(cluster: Cluster, site: Site, job: str) -> None:
    cluster.ask("scontrol", "requeue", job)


def node_down(cluster: Cluster, site: Site, job: str) -> None:
    cluster.ask("scontrol", "update", "nodename=node2", "state=down", "reason=test")
    # It returns by itself once it has reported again (ReturnToService).


def killed_rank(cluster: Cluster, site: Site, job: str) -> None:
    os.kill(cluster.ranks(job)[-1], signal.SIGKILL)


@pytest.mark.parametrize(
    "disturb",
    [
        requeue,
        *(pytest.param(f, marks=pytest.mark.full) for f in (signal_to_the_steps, time_limit, node_down, killed_rank)),
    ],
)
def test_disturbed_it_ends_in_the_same_bits(
    disturb: Callable[[Cluster, Site, str], None], site: Site, cluster: Cluster, undisturbed: Path, tmp_path: Path
) -> None:
    limit = ("--time=2", "--signal=B:USR1@60") if disturb is time_limit else ()
    job = site.submit("slurm/grow_gemma4b.sh", site.recipe(tmp_path), options=limit, **QUICK)
    wait_for(lambda: site.steps(job) >= 7, 200, "step 7")
    disturb(cluster, site, job)
    assert cluster.finish(job) == "COMPLETED", site.log(job)
    assert cluster.field(job, "Restarts") == "1"
    again = 0 if disturb in (signal_to_the_steps, time_limit) else SAVE
    assert site.steps(job) <= STEPS + again, "no more is done again than since the last checkpoint"
    assert weights(Path(f"{tmp_path}/run-stock")) == weights(Path(f"{undisturbed}-stock"))


@pytest.mark.full
def test_cancelled_it_stays_away_and_submitted_again_it_goes_on(
    site: Site, cluster: Cluster, undisturbed: Path, tmp_path: Path
) -> None:
    path = site.recipe(tmp_path)
    job = site.submit("slurm/grow_gemma4b.sh", path, **QUICK)
    wait_for(lambda: site.steps(job) >= 7, 200, "step 7")
    cluster.ask("scancel", job)
    assert cluster.finish(job) == "CANCELLED", site.log(job)
    second = site.submit("slurm/grow_gemma4b.sh", path, options=("--no-requeue",), **QUICK)
    wait_for(lambda: site.steps(second) >= 2, 200, "two more steps")
    cluster.ask("scancel", "--signal=USR1", second)
    assert cluster.finish(second) == "FAILED"
    assert "requeueing is off" in site.log(second)
    third = site.submit("slurm/grow_gemma4b.sh", path, **QUICK)
    assert cluster.finish(third) == "COMPLETED", site.log(third)
    assert site.steps(job) + site.steps(second) + site.steps(third) <= STEPS + SAVE
    assert weights(Path(f"{tmp_path}/run-stock")) == weights(Path(f"{undisturbed}-stock"))


@pytest.mark.full
def test_submitted_twice_the_second_leaves_the_first_alone(site: Site, cluster: Cluster, tmp_path: Path) -> None:
    path = site.recipe(tmp_path)
    one_node = ("--nodes=1",)
    first = site.submit("slurm/grow_gemma1b.sh", path, options=one_node, **QUICK)
    wait_for(lambda: site.steps(first) >= 1, 200, "step 1")
    second = site.submit("slurm/grow_gemma1b.sh", path, options=one_node, **QUICK)
    assert cluster.finish(second) == "COMPLETED"
    assert f"job {first} works on {tmp_path}/run already" in site.log(second)
    assert cluster.finish(first) == "COMPLETED", site.log(first)
    assert site.steps(first) == STEPS
    third = site.submit("slurm/grow_gemma1b.sh", path, options=one_node, **QUICK)
    assert cluster.finish(third) == "COMPLETED"
    assert site.steps(third) == 0 and "done: " in site.log(third)


@pytest.mark.full
def test_a_pilot_chooses_the_layers(site: Site, cluster: Cluster, tmp_path: Path) -> None:
    """Pilot, ranking, expansion, training, consolidation: four jobs, each after the one before."""
    path = site.recipe(tmp_path, kind="text", save_steps=STEPS)
    said = cluster.ask(
        "slurm/pipeline.sh", "--pilot", path, "--method", "g_freeze", "--max_steps=6", cwd=site.clone,
        GPU_SBATCH="--nodes=1 --ntasks-per-node=2 --gpus-per-node=2", CPU_SBATCH="--nodes=1",
        PILOT_STEPS="4", TOP="2", **site.variables | QUICK,
    )  # fmt: skip
    pilot, expanding, training, consolidating = re.findall(r"^(\d+) ", said, re.MULTILINE)
    assert cluster.finish(consolidating) == "COMPLETED", "".join(map(site.log, (pilot, expanding, training)))
    assert (site.steps(pilot), site.steps(training)) == (4, 6)
    run = tmp_path / "run"
    assert json.loads((run / "run.json").read_text())["recipe"]["method"] == "g_freeze"
    ranked = json.loads(Path(f"{run}-ranking/ranking.json").read_text())["layers"]
    grown = json.loads(Path(f"{run}-grown/config.json").read_text())["growth"]["layers"]
    assert len(ranked) == 4 and grown == sorted(ranked[:2])
    transformers.Gemma3ForCausalLM.from_pretrained(f"{run}-stock")
