"""The image of docker/Dockerfile, built with buildah on a Debian made by debootstrap, and the work done inside it.

Needs root, buildah, debootstrap (launch/test.sh --full installs them as root on Debian) and a mirror of Debian.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.tiny import ROOT, clone, folder_checksums, grow, make_base, make_data, make_recipe, repository_files

BUILDS = ("buildah", "debootstrap")
absent = [program for program in BUILDS if not shutil.which(program)] or (["root"] if os.geteuid() else [])
pytestmark = [
    pytest.mark.full,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(bool(absent), reason=f"no image can be built: {', '.join(absent)} missing"),
]


class Image:
    """What was built, and a container of it. `folder` holds all of buildah's storage."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.container = ""

    def buildah(self, *arguments: str | Path) -> str:
        storage = ["--storage-driver", "vfs", "--root", self.folder / "storage", "--runroot", self.folder / "run"]
        done = subprocess.run(["buildah", *storage, *arguments], capture_output=True, text=True, errors="replace")
        assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        return done.stdout.strip()

    def make_base(self) -> None:
        root = self.folder / "debian"
        subprocess.run(["debootstrap", "--variant=minbase", "bookworm", root], check=True, stdout=subprocess.DEVNULL)
        empty = self.buildah("from", "scratch")
        self.buildah("add", "--quiet", empty, root, "/")
        self.buildah("commit", "--quiet", "--rm", empty, "localhost/grow-base")
        shutil.rmtree(root)

    def build(self, context: Path) -> None:
        # The packages as this machine's pip finds them, wherever that is; the build has them from this folder alone.
        wheels = self.folder / "wheels"
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--dest", wheels, "setuptools", "wheel",
             "--requirement", ROOT / "requirements.txt"], check=True,
        )  # fmt: skip
        variables = {"BASE": "localhost/grow-base", "PIP_FIND_LINKS": "/wheels", "PIP_NO_INDEX": "1"}
        self.buildah(
            "bud", "--isolation", "chroot", "--format", "docker", "--volume", f"{wheels}:/wheels:ro",
            *(f"--build-arg={name}={value}" for name, value in variables.items()),
            "--file", context / "docker" / "Dockerfile", "--tag", "grow", context,
        )  # fmt: skip
        self.container = self.buildah("from", "grow")

    def run(self, *command: str | Path, mounts: tuple[str, ...] = ()) -> str:
        """What a command prints in the image, as its user."""
        volumes = [f"--volume={mount}" for mount in mounts]
        return self.buildah("run", "--isolation", "chroot", *volumes, "--", self.container, *command)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    image = Image(tmp_path_factory.mktemp("image"))
    context = clone(image.folder / "context")
    for name in ("runs/weights.bin", "slurm/site.env", "grow/__pycache__/x.pyc", ".venv/x"):
        (context / name).parent.mkdir(parents=True, exist_ok=True)
        (context / name).write_text("of no use in an image")
    try:
        image.make_base()
        image.build(context)
        yield image
    finally:
        shutil.rmtree(image.folder)  # some GB


def let_anyone(*folders: Path) -> None:
    """Read and write, since the image's user has another number than whoever runs the tests."""
    for folder in folders:
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o777 if path.is_dir() else 0o666)


def test_the_image_holds_what_runs_and_nothing_that_builds(image: Image) -> None:
    assert image.run("id", "-u") == "10001"
    tools = ("cc", "c++", "gcc", "g++", "cpp", "as", "ld", "make")
    assert image.run("sh", "-c", f"for tool in {' '.join(tools)}; do command -v $tool; done; true") == ""
    there = image.run("sh", "-c", "cd /opt/grow && find . -type f").split("\n")
    folders = ("launch/", "recipes/", "slurm/", "requirements.txt", "LICENSE", "README.md")
    assert sorted(there) == sorted(f"./{name}" for name in repository_files() if name.startswith(folders))
    code = image.run("python", "-c", "import grow; print(grow.__file__)").removesuffix("/__init__.py")
    there = image.run("sh", "-c", f"cd {code}/.. && find grow -type f ! -name '*.pyc'").split("\n")
    assert sorted(there) == sorted(name for name in repository_files() if re.match(r"grow/.*\.(py|json)$", name))
    said = image.buildah("inspect", "--type", "image", "grow")
    assert "/wheels" not in said and "PIP_" not in said, "where packages came from is nobody's business"
    health = json.loads(said)["Docker"]["config"]["Healthcheck"]["Test"]
    assert health == ["CMD", "python", "-m", "grow", "--help"]
    image.run(*health[1:])


def test_the_demos_expansion_is_the_same_inside(image: Image, real_base: Path, tmp_path: Path) -> None:
    base, out = tmp_path / "model", tmp_path / "out"
    out.mkdir()
    shutil.copytree(real_base, base)
    let_anyone(base, out)
    grow("expand", base, tmp_path / "outside")
    mounts = (f"{base}:/model:ro", f"{out}:/out")
    image.run("python", "-m", "grow", "expand", "/model", "/out/grown", mounts=mounts)
    assert (out / "grown" / "config.json").stat().st_uid == 10001
    inside, outside = folder_checksums(out / "grown"), folder_checksums(tmp_path / "outside")
    assert inside == outside and len(inside) > 5
    for path in (base, out, tmp_path / "outside"):  # some GB
        shutil.rmtree(path)


def test_two_ranks_train_inside_without_a_compiler(image: Image, tmp_path: Path) -> None:
    site = tmp_path / "site"
    base, data = make_base(site / "base", "text"), make_data(site / "data")
    make_recipe(site / "recipe.yaml", base, site / "grown", data, 2, deepspeed="zero2")
    let_anyone(site)
    mounts = (f"{site}:{site}",)
    image.run("launch/expand.sh", site / "recipe.yaml", mounts=mounts)
    image.run("env", "NPROC=2", "launch/train.sh", site / "recipe.yaml", mounts=mounts)
    assert (site / "run" / "COMPLETE").is_file()
