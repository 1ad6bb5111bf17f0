"""What tests share: tiny random models of each class, built by stock transformers, and the real 270M."""

import json
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
os.environ.setdefault("GROW_CACHE", str(Path.home() / ".cache" / "grow"))
# One thread's sums are the same from run to run; and with one arena memory does not creep up.
os.environ.setdefault("MALLOC_ARENA_MAX", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="also run what takes long")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--full"):
        return
    items[:] = [item for item in items if "full" not in item.keywords]


@pytest.fixture(scope="session")
def real_base() -> Path:
    """The real Gemma 3 270M, in three shards (launch/test.sh fetches it)."""
    return Path(os.environ["GROW_CACHE"]) / "gemma3_270m" / "model"


@pytest.fixture(scope="session", params=["text", "multimodal"])
def tiny_base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.tiny import make_base

    return make_base(tmp_path_factory.mktemp("base") / request.param, request.param)


@pytest.fixture(scope="session")
def text_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.tiny import make_base

    return make_base(tmp_path_factory.mktemp("base") / "text", "text")


@pytest.fixture(scope="session")
def sums(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.tiny import make_data

    return make_data(tmp_path_factory.mktemp("data") / "sums")


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of general text, to stay near the base on."""
    folder = tmp_path_factory.mktemp("data")
    rows = [{"text": f"{n} and {n + 1} are {2 * n + 1}."} for n in range(40)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
