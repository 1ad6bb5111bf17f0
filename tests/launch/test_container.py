"""CONTAINER: how the scripts call what runs containers, and that they do the same work through it.

apptainer, docker, enroot and pyxis's options of srun are stand-ins here, which note how they are called and run the
command on this machine with what an image sets. Scripts, Slurm and commands are real.
"""

import os
import sys
from pathlib import Path

import pytest

from tests.helpers import slurm_cluster
from tests.helpers.slurm_cluster import Cluster
from tests.helpers.tiny import ROOT, make_recipe, run
from tests.launch.test_slurm import QUICK, Site
from tests.launch.test_slurm import cluster as cluster
from tests.launch.test_slurm import site as site

# Runs what follows the image; what goes before it is noted, a line a call.
AROUND = """\
#!/bin/bash
echo "$(basename "$0") $*" >> "$CALLS"
while [[ $1 != "$CONTAINER" ]]; do shift; done
IN_IMAGE=1 exec "${@:2}"
"""
# Takes away the options that pyxis adds, notes them, and runs the real srun.
PYXIS = """\
#!/bin/bash
options=() container=()
while [[ $1 == --* ]]; do
    if [[ $1 == --container-* ]]; then container+=("$1"); else options+=("$1"); fi
    shift
done
echo "srun ${container[*]}" >> "$CALLS"
exec {srun} "${options[@]}" env IN_IMAGE=1 "$@"
"""


def stand_ins(folder: Path, container: str) -> dict[str, str]:
    """The variables with which scripts find them."""
    folder.mkdir()
    real = slurm_cluster.find("srun")
    for name in ("apptainer", "docker", "enroot", *(["srun"] if real else [])):
        (folder / name).write_text(PYXIS.replace("{srun}", real) if name == "srun" else AROUND)
        (folder / name).chmod(0o755)
    return {"CONTAINER": container, "CALLS": str(folder / "calls"), "PATH": f"{folder}:{os.environ['PATH']}"}


@pytest.mark.parametrize("kind", ["grow.sif", "grow.sqsh", "grow:latest"])
def test_a_script_goes_on_in_the_container(kind: str, text_base: Path, sums: Path, tmp_path: Path) -> None:
    container = kind if ":" in kind else str(tmp_path / kind)
    cache, hub, more = (str(tmp_path / name) for name in ("cache", "hub", "more of it"))
    environment = stand_ins(tmp_path / "bin", container) | {"GROW_CACHE": cache, "HF_HOME": hub, "HF_TOKEN": "secret"}
    environment |= {"CONTAINER_MOUNTS": more, "SLURM_JOB_ID": ""}
    recipe = make_recipe(tmp_path / "r.yaml", text_base, tmp_path / "grown", sums, 2)
    if ":" not in kind:
        assert "no such image" in run("launch/expand.sh", recipe, code=2, **environment).stderr
        Path(container).touch()
    run("launch/expand.sh", recipe, **environment)
    assert (tmp_path / "grown" / "config.json").is_file()
    (called,) = Path(environment["CALLS"]).read_text().splitlines()
    option = {"grow.sif": "--bind", "grow.sqsh": "--mount", "grow:latest": "--volume"}[kind]
    for path in (ROOT, cache, hub, more):
        assert f" {option} {path}:{path} " in called
    before, _, command = called.partition(f" {container} ")
    if kind == "grow.sif":
        assert before.startswith(f"apptainer exec --pwd {ROOT} --bind ")
    else:
        assert " --env HF_TOKEN " in before and "secret" not in called, "its value is not for ps to show"
    if kind == "grow.sqsh":
        assert before.startswith("enroot start --mount ")
        command = command.removeprefix(f"env -C {ROOT} ")
    if kind == "grow:latest":
        assert before.startswith(f"docker run --rm --init --ipc=host --user {os.getuid()}:{os.getgid()} --workdir ")
    assert command == f"{ROOT}/launch/expand.sh {recipe}"


def test_an_image_with_other_requirements_is_refused(tmp_path: Path) -> None:
    (tmp_path / "installed-requirements.txt").write_text("torch==1.0\n")
    said = run("launch/expand.sh", "r.yaml", code=2, IN_IMAGE="1", VENV=str(tmp_path), PYTHON=sys.executable).stderr
    assert "build it again" in said and said.count("\n") == 1


@pytest.mark.full
@pytest.mark.skipif(bool(slurm_cluster.missing()), reason=f"no Slurm: {slurm_cluster.missing()}")
@pytest.mark.parametrize("kind", ["grow.sif", "grow.sqsh"])
def test_a_job_runs_in_the_container(kind: str, site: Site, cluster: Cluster, tmp_path: Path) -> None:
    container = tmp_path / kind
    container.touch()
    environment = stand_ins(tmp_path / "bin", str(container))
    environment["PATH"] += ":/usr/sbin:/sbin"
    recipe = site.recipe(tmp_path, "text", str(tmp_path / "grown"), max_steps=4)
    job = site.submit("slurm/grow_gemma1b.sh", recipe, options=("--nodes=1",), **(QUICK | environment))
    assert cluster.finish(job) == "COMPLETED", site.log(job)
    assert (tmp_path / "run-stock" / "config.json").is_file()
    calls = Path(environment["CALLS"]).read_text().splitlines()
    if kind == "grow.sif":
        calls = [call for call in calls if call.startswith("apptainer ")]
        assert sum("launch/rank.sh" in call for call in calls) == 2, "one a rank"
        assert all(call.startswith("apptainer exec --pwd ") and f" {container} " in call for call in calls)
    else:
        assert all(call.startswith(f"srun --container-image={container} --container-workdir=") for call in calls)
        assert all(f"{site.clone}:{site.clone}" in call.partition("--container-mounts=")[2] for call in calls)
    mixed = site.submit(
        "slurm/grow_gemma1b.sh", recipe, options=("--nodes=1",), **(environment | {"INTERFACE": "auto"})
    )
    assert cluster.finish(mixed) == "FAILED" and "name the interface" in site.log(mixed)
