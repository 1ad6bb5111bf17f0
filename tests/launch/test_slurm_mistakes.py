"""What is missing stands in a job's first lines, within a minute; and jobs that hang together."""

import http.server
import json
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import slurm_cluster
from tests.helpers.slurm_cluster import Cluster, wait_for
from tests.helpers.tiny import run
from tests.launch.test_slurm import NODES, QUICK, Site
from tests.launch.test_slurm import cluster as cluster
from tests.launch.test_slurm import site as site
from tests.study.test_study import make_grid

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(bool(slurm_cluster.missing()), reason=f"no Slurm: {slurm_cluster.missing()}"),
]
TWO_NODES = " ".join(("--nodes=2", *NODES[:2]))


@pytest.mark.parametrize(
    ("fields", "environment", "says"),
    [
        ({"base": "/nowhere/model", "grown": "/nowhere/grown"}, {}, [r"grow: /nowhere/model: no such folder"]),
        ({"base": "google/gemma-3-4b-pt", "method": "sft"}, {}, [r"grow: google/gemma-3-4b-pt: .*fetch it with .*"]),
        ({"learning_rat": 1}, {}, [r"grow: .*: learning_rat is not a field; did you mean learning_rate\?"]),
        ({"data": "${NOT_SET_ANYWHERE}/x"}, {}, [r"grow: .*: an environment variable in it is not set"]),
        ({}, {"MIN_FREE_GB": "1e9"}, [rf"node{n}: .* GB free in .*, 1e\+09 are wanted \(MIN_FREE_GB\)" for n in "12"]),
        ({}, {"MASTER_ADDR": "192.0.2.1", "CHECK_TIMEOUT": "10"},
         [rf"node{n}: cannot reach the first node at 192\.0\.2\.1:\d+.*" for n in "12"]),
    ],
    ids=["model", "hub", "recipe", "variable", "space", "network"],
)  # fmt: skip
def test_mistakes(
    fields: dict[str, str], environment: dict[str, str], says: list[str], site: Site, cluster: Cluster, tmp_path: Path
) -> None:
    start = time.monotonic()
    job = site.submit("slurm/grow_gemma4b.sh", site.recipe(tmp_path, **fields), **environment)
    assert cluster.finish(job) == "FAILED", site.log(job)
    assert time.monotonic() - start < 60
    assert cluster.field(job, "ExitCode") == "2:0"
    # Beside the job's diary, what srun and expanding say.
    other = re.compile(r"\d{4}-|srun: |written: |grown by|added: |trained: |.* parameters,")
    found = sorted(line for line in site.log(job).splitlines() if not other.match(line))
    assert len(found) == len(says) and all(map(re.fullmatch, says, found)), found


@pytest.fixture
def gated_hub() -> Iterator[str]:
    class Gated(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(401)
            self.send_header("X-Error-Code", "GatedRepo")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Gated)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_prepare_without_a_token(gated_hub: str, tmp_path: Path) -> None:
    done = run("launch/prepare.sh", "recipes/gemma3_4b/translation.yaml", code=2, HF_ENDPOINT=gated_hub,
               HF_HOME=str(tmp_path))  # fmt: skip
    (line,) = done.stderr.splitlines()
    assert line.startswith("grow: google/gemma-3-4b-pt: is gated: accept its licence at https://huggingface.co/")


def pipeline(site: Site, cluster: Cluster, recipe: Path, **environment: str) -> list[str]:
    printed = cluster.ask(
        "slurm/pipeline.sh", recipe, cwd=site.clone, **(site.variables | environment),
        CPU_SBATCH="--nodes=1 --ntasks=1", GPU_SBATCH=TWO_NODES,
    )  # fmt: skip
    assert "follow: squeue --jobs=" in printed
    return re.findall(r"^(\d+) (?:expanding|training|consolidating)$", printed, re.MULTILINE)


def test_pipeline(site: Site, cluster: Cluster, tmp_path: Path) -> None:
    jobs = pipeline(site, cluster, site.recipe(tmp_path, kind="text", grown=str(tmp_path / "grown")))
    assert [cluster.finish(job) for job in jobs] == ["COMPLETED"] * 3, [site.log(job) for job in jobs]
    times = [(cluster.field(job, "StartTime"), cluster.field(job, "EndTime")) for job in jobs]
    assert times[0][1] <= times[1][0] and times[1][1] <= times[2][0]
    assert (tmp_path / "run-stock" / "config.json").exists()


def test_pipeline_whose_first_job_fails(site: Site, cluster: Cluster, tmp_path: Path) -> None:
    jobs = pipeline(site, cluster, site.recipe(tmp_path, base="/nowhere/model", grown="/nowhere/grown"))
    assert [cluster.finish(job) for job in jobs] == ["FAILED", "CANCELLED", "CANCELLED"]
    assert "DependencyNeverSatisfied" in cluster.field(jobs[1], "Reason") + cluster.field(jobs[2], "Reason")


def test_pipeline_whose_training_is_killed(site: Site, cluster: Cluster, tmp_path: Path) -> None:
    jobs = pipeline(site, cluster, site.recipe(tmp_path, kind="text"), SKIP_CHECK="1")
    wait_for(lambda: site.steps(jobs[1]) >= 7, 200, "step 7")
    cluster.ask("scancel", "--signal=KILL", "--full", jobs[1])
    assert cluster.finish(jobs[1]) != "COMPLETED"
    assert cluster.finish(jobs[2]) == "CANCELLED"
    assert not (tmp_path / "run-stock").exists()


def test_sweep(site: Site, cluster: Cluster, tmp_path: Path) -> None:
    recipe = site.recipe(tmp_path, kind="text", grown=str(tmp_path / "grown"))
    variables = site.variables | QUICK | {
        "RECIPES": str(recipe), "METHODS": "g_freeze sft", "RATES": "1e-3", "SWEEP": str(tmp_path / "a sweep"),
        "SWEEP_SBATCH": "--nodes=1 --ntasks-per-node=1 --gpus-per-node=1",
    }  # fmt: skip
    printed = cluster.ask("slurm/sweep.sh", "--max_steps", "3", cwd=site.clone, **variables)
    array = re.match(r"(\d+): 2 runs", printed)
    assert array, printed
    wait_for(lambda: len(list((tmp_path / "a sweep").glob("*-stock"))) == 2, 300, "both runs")
    wait_for(lambda: not cluster.ask("squeue", "--noheader"), 60, "the end of the jobs")
    printed = cluster.ask("slurm/sweep.sh", "--max_steps", "3", cwd=site.clone, **variables)
    assert printed.startswith("all 2 runs are done")
    other = tmp_path / "again" / tmp_path.name / recipe.name  # whose runs would have the folders of the first
    other.parent.mkdir(parents=True)
    other.write_text(recipe.read_text())
    variables |= {"RECIPES": f"{recipe} {other}", "SWEEP": str(tmp_path / "another")}
    cluster.ask("slurm/sweep.sh", "--max_steps", "3", cwd=site.clone, code=2, **variables)


def test_a_trial_and_then_the_run(site: Site, cluster: Cluster, tmp_path: Path) -> None:
    """Some layers grow and end in a stock checkpoint; a finished run is not taken for a longer one, nor its growth for
    that of other layers."""
    recipe = site.recipe(tmp_path, kind="text", grown=str(tmp_path / "grown"))
    job = site.submit("slurm/grow_gemma1b.sh", recipe, "--max_steps", "3", LAYERS="0-1", **QUICK)
    assert cluster.finish(job) == "COMPLETED", site.log(job)
    assert (tmp_path / "run-stock" / "config.json").exists()
    for words, layers, says in (
        (("--max_steps", "5"), "0-1", "holds a run with max_steps 3, not 5"),
        (("--max_steps", "3"), "0-2", "has not grown in layers 0, 1, 2 by 2"),
    ):
        job = site.submit("slurm/grow_gemma1b.sh", recipe, *words, LAYERS=layers, **QUICK)
        assert cluster.finish(job) == "FAILED" and cluster.field(job, "ExitCode") == "2:0", site.log(job)
        assert says in site.log(job)


def test_sweep_of_a_study(site: Site, cluster: Cluster, tmp_path: Path) -> None:
    """Two jobs share its cells; preempted, they are requeued and resume."""
    grid = make_grid(tmp_path, site.bases["text"], site.data)
    variables = site.variables | {
        "STUDY": str(grid), "SWEEP": str(tmp_path / "a sweep"), "PARALLEL": "2",
        "SWEEP_SBATCH": "--nodes=1 --ntasks-per-node=1 --gpus-per-node=1",
    }  # fmt: skip
    printed = cluster.ask("slurm/sweep.sh", cwd=site.clone, **variables)
    array = re.match(r"(\d+): 2 jobs, which share the cells of .*grid.yaml", printed)
    assert array, printed
    log = site.clone / f"grow-sweep-{array[1]}_0.out"
    wait_for(lambda: log.exists() and "== " in log.read_text(), 120, "the first job's first cell")
    cluster.ask("scancel", "--signal=USR1", "--batch", f"{array[1]}_0")
    wait_for(lambda: not cluster.ask("squeue", "--noheader"), 400, "the end of the jobs")
    assert "back into the queue" in log.read_text()
    assert "done: nothing is left" in log.read_text()
    lines = [json.loads(line)["cell"] for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert sorted(lines) == ["sft 0.001 seed 0", "some layers 0.01 seed 0"]
