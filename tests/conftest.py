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
    parser.addoption("--gpu", action="store_true", help="run on GPUs, and only what does other work there")


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("--gpu"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a machine with one GPU has none for a second rank
        return
    import torch

    if not torch.cuda.is_available():
        raise pytest.UsageError("--gpu: torch sees no GPU here")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    full, gpu = config.getoption("--full"), config.getoption("--gpu")
    items[:] = [
        item for item in items if (full or item.get_closest_marker("full") is None) and (not gpu or _runs_on_gpus(item))
    ]


def _runs_on_gpus(item: pytest.Item) -> bool:
    import torch

    ranks = item.callspec.params.get("ranks", 1) if hasattr(item, "callspec") else 1
    return item.get_closest_marker("gpu") is not None and ranks <= torch.cuda.device_count()


@pytest.fixture(scope="session")
def device() -> str:
    """What a model that a test runs itself is put on."""
    from grow.model.loading import compute_device

    return compute_device()


@pytest.fixture(scope="session")
def real_base() -> Path:
    """The real Gemma 3 270M, in three shards (launch/test.sh fetches it)."""
    return Path(os.environ["GROW_CACHE"]) / "gemma3_270m" / "model"


@pytest.fixture(scope="session", params=["text", "multimodal"])
def tiny_base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.helpers.tiny import make_base

    return make_base(tmp_path_factory.mktemp("base") / request.param, request.param)


@pytest.fixture(scope="session")
def text_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.helpers.tiny import make_base

    return make_base(tmp_path_factory.mktemp("base") / "text", "text")


@pytest.fixture(scope="session")
def sums(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.helpers.tiny import make_data

    return make_data(tmp_path_factory.mktemp("data") / "sums")


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of general text, for KL regularisation."""
    folder = tmp_path_factory.mktemp("data")
    rows = [{"text": f"{n} and {n + 1} are {2 * n + 1}."} for n in range(40)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
