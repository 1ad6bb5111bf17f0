"""The first hour of somebody else on a cluster: prepare.sh, then sbatch, by a recipe's own names of model and data."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from tests.data.test_hub import stand_ins
from tests.helpers import slurm_cluster
from tests.helpers.hub import TOKEN, Hub, serving
from tests.helpers.slurm_cluster import Cluster
from tests.helpers.tiny import clone, environment, run
from tests.launch.test_slurm import NODES
from tests.launch.test_slurm import cluster as cluster

pytestmark = [
    pytest.mark.skipif(bool(slurm_cluster.missing()), reason=f"no Slurm: {slurm_cluster.missing()}"),
    pytest.mark.full,
]


@pytest.mark.parametrize(
    ("size", "base", "cls", "wider"),
    [
        ("gemma3_1b", "gemma-3-1b-pt", transformers.Gemma3ForCausalLM, "num_attention_heads"),
        ("gemma4_e2b", "gemma-4-E2B", transformers.Gemma4ForConditionalGeneration, "intermediate_size"),
    ],
)
def test_from_the_hub_to_a_scored_stock_checkpoint(
    size: str, base: str, cls: Any, wider: str, cluster: Cluster, tmp_path: Path
) -> None:
    stand_ins(tmp_path / "hub")
    ours = clone(tmp_path / "clone")
    places = {"HF_HOME": str(tmp_path / "hf"), "GROW_CACHE": str(tmp_path / "cache"), "VENV": str(environment(ours))}
    recipe = f"recipes/{size}/translation.yaml"
    with serving(Hub(tmp_path / "hub", gated=(f"google/{base}",))) as hub:
        run(ours / "launch/prepare.sh", ours / recipe, HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN, **places)
    # There is no network from here on: nobody answers under the hub's address any more.
    script = f"slurm/grow_{size.replace('gemma3_', 'gemma')}.sh"
    job = cluster.ask(
        "sbatch", "--parsable", f"--chdir={ours}", *NODES, script, "--max_steps", "3",
        cwd=ours, HF_ENDPOINT=hub.url, MIN_FREE_GB="0.01", RANK_WAIT="5", **places,
    ).strip()  # fmt: skip
    state = cluster.finish(job)
    (log,) = ours.glob(f"*-{job}.out")
    assert state == "COMPLETED", log.read_text()
    run_folder = ours / f"runs/{size}-translation-g_freeze"
    stock, info = cls.from_pretrained(f"{run_folder}-stock", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    before = cls.from_pretrained(tmp_path / f"hub/models/google/{base}/main")
    now, then = (getattr(model.config.get_text_config(), wider) for model in (stock, before))
    assert now == 2 * then
    scores = json.loads(Path(f"{run_folder}-scores.json").read_text())
    assert scores["task"]["rows"] == 10 and "chrf" in scores["task"]
