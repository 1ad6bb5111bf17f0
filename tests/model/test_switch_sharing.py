"""A switch in a model whose upper layers share keys and values (Gemma 4 E2B and E4B): of a prompt, in `generate`, these
compute the last token alone."""

from pathlib import Path
from typing import Any

import pytest
import torch

from grow.errors import UserError
from grow.model.switched import put_switch, whole_below
from tests.checkpoint.test_architectures import make
from tests.helpers.tiny import make_tokenizer
from tests.model.test_switch import BOTH, GENERATE, PROMPTS, base_of, on_of, padded, record_for, three, trained

HOW: list[dict[str, Any]] = [{}, {"cache_implementation": "static"}, {"use_cache": False}, {"prefill_chunk_size": 5}]


@pytest.fixture(scope="module")
def sharing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers 2 and 3 of four share the keys and values of those below."""
    how = {"num_attention_heads": 4, "num_key_value_heads": 2, "global_head_dim": 32, "sliding_window": 6}
    folder = make(tmp_path_factory.mktemp("sharing") / "base", "gemma4", torch.float32, **how)
    make_tokenizer(folder)
    assert whole_below(base_of(folder, torch.float32), 4) == 2
    return folder


@BOTH
@pytest.mark.parametrize("kind", ["row", "answer"])
@pytest.mark.parametrize(
    ("layers", "layer"), [("2,3", 1), ("2,3", 2), ("all", 1), ("queries all", 1), ("queries 3", 2)]
)
def test_what_is_written(sharing: Path, dtype: torch.dtype, layers: str, layer: int, kind: str) -> None:
    """Where it is off the base's, in the same bits; where it is on what the growth writes, if it was on from the first
    token. It is decided below these layers or, in a first pass, in them."""
    record = record_for(sharing, layer, kind=kind)
    on_of(sharing, record)
    models = three(sharing, dtype, record, layers=layers)
    assert models[2].switch.first_pass == (layer == 2 or "all" in layers)
    for how in HOW:
        options = GENERATE | how | {"do_sample": False, "output_scores": True, "return_dict_in_generate": True}
        written = [model.generate(**padded(left=True), **options) for model in models]
        on = models[2].switched
        assert on.any() and not on.all()
        base, grown, found = (torch.stack(one.scores, 1) for one in written)
        assert torch.equal(found[~on], base[~on]) and not torch.equal(found[on], base[on])
        if kind == "row" and dtype == torch.float32:
            assert torch.allclose(found[on][:, 0], grown[on][:, 0], atol=1e-4)


def test_each_token_is_decided_below(sharing: Path) -> None:
    with pytest.raises(UserError, match="reads layer 2, and from layer 2 on this model computes of a prompt its last"):
        put_switch(trained(sharing, torch.float32), record_for(sharing, 2, kind="token"))
    put_switch(trained(sharing, torch.float32), record_for(sharing, 1, PROMPTS, "token"))
