"""Installed, `grow` is a command in any folder; and the scripts run with the `grow` of their own checkout alone."""

import re
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

import grow
from tests.helpers.tiny import ROOT, clone, environment, repository_files, run

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize(
    ("file", "listed"),
    [
        ("requirements.txt", PROJECT["dependencies"]),
        ("tests/requirements-test.txt", PROJECT["optional-dependencies"]["test"]),
    ],
)
def test_what_is_pinned_is_what_is_asked_for(file: str, listed: list[str]) -> None:
    pins = [line for line in (ROOT / file).read_text().splitlines() if not line.startswith("#")]
    assert [re.split("[=<>]", line)[0] for line in pins] == [re.split("[=<>]", line)[0] for line in listed]
    assert not [line for line in listed if "==" in line]


def test_a_wheel_holds_the_package_and_runs_anywhere(tmp_path: Path) -> None:
    ours = clone(tmp_path / "clone")
    pip = [sys.executable, "-m", "pip", "--quiet"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, ours]
    subprocess.run([*pip, *build], check=True)
    (wheel,) = tmp_path.glob(f"grow-{grow.__version__}-*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == {name for name in repository_files() if name.startswith("grow/") and name.endswith((".py", ".json"))}
    venv.create(tmp_path / "venv", symlinks=True)
    subprocess.run([*pip, "--python", tmp_path / "venv", "install", "--no-deps", wheel], check=True)
    for command in (["bin/grow"], ["bin/python", "-m", "grow"]):
        words = [tmp_path / "venv" / command[0], *command[1:], "plann"]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 2 and "did you mean plan?" in done.stderr, done.stderr


def test_an_environment_of_another_checkout_is_refused(tmp_path: Path) -> None:
    """Both places are named; its own scripts find nothing to install in it; and an image is the one exception."""
    ours = clone(tmp_path / "clone")
    path = environment(ours)
    (said,) = run("launch/expand.sh", "r.yaml", code=2, VENV=str(path)).stderr.splitlines()
    assert said.startswith(f"expand.sh: VENV={path}: its grow is {ours}/grow, not {ROOT}/grow; ")
    (said,) = run(ours / "launch/expand.sh", "r.yaml", code=2, VENV=str(path)).stderr.splitlines()
    assert "no recipe there" in said
    (ours / "grow/more.py").touch()
    said = run("launch/expand.sh", "r.yaml", code=2, VENV=str(path), IN_IMAGE="1").stderr
    assert "the image's grow is used, and it is not the same" in said and "no recipe there" in said


def test_an_environment_from_before_gets_the_project_alone(tmp_path: Path) -> None:
    (bin_ := tmp_path / "venv" / "bin").mkdir(parents=True)
    (bin_ / "pip").write_text(f'#!/bin/sh\necho "$*" >>{tmp_path}/asked\n')
    (bin_ / "python").write_text("#!/bin/sh\n")
    for file in bin_.iterdir():
        file.chmod(0o755)
    (tmp_path / "venv" / "installed-requirements.txt").write_bytes((ROOT / "requirements.txt").read_bytes())
    run("bash", "-c", "source launch/common.sh; install requirements.txt", VENV=str(tmp_path / "venv"))
    (asked,) = (tmp_path / "asked").read_text().splitlines()
    assert asked.endswith(f"--no-deps --no-build-isolation --editable {ROOT}")
