"""Every causal language model of the installed transformers, small: it grows exactly and comes back to stock, or it is
refused in one line. What could not be built small is listed.

The table in grow/checkpoint/README.md is what this prints:

    ./launch/test.sh --full tests/checkpoint/test_every_class.py -s
"""

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.running import FORKED

SMALL: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 32, "d_model": 32, "n_embd": 32, "intermediate_size": 48, "ffn_dim": 48,
    "decoder_ffn_dim": 48, "ffn_hidden_size": 48, "n_inner": 48, "num_hidden_layers": 2, "num_layers": 2, "n_layer": 2,
    "decoder_layers": 2, "encoder_layers": 2, "num_attention_heads": 2, "n_head": 2, "num_heads": 2,
    "decoder_attention_heads": 2, "encoder_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
    "max_position_embeddings": 64, "n_positions": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "rotary_dim": 8, "num_experts": 2, "num_local_experts": 2, "n_routed_experts": 2, "moe_intermediate_size": 16,
    "vocab_size_per_layer_input": 320, "hidden_size_per_layer_input": 8, "q_lora_rank": 8, "kv_lora_rank": 8,
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16, "num_experts_per_tok": 1,
    "query_pre_attn_scalar": 16, "image_token_id": 9, "audio_token_id": 9, "first_k_dense_replace": 1, "n_group": 1,
    "topk_group": 1, "word_embed_proj_dim": 32, "attention_types": [[["global"], 2]],
    "partial_rotary_factor": 0.5, "num_kv_heads": 1, "global_head_dim": 16, "laurel_rank": 8,
}  # fmt: skip
"""What a config says of sizes, whichever of these it has."""


def names() -> list[str]:
    """The names of the classes."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()))


def shrunk(config_cls: Any, **more: Any) -> Any:
    """A config of a class with all that has a size made small."""
    default = config_cls()
    known = {key: value for key, value in SMALL.items() if hasattr(default, key)} | more
    for part, cls in config_cls.sub_configs.items():
        if isinstance(cls, type) and getattr(default, part, None) is not None and part.endswith("_config"):
            known[part] = shrunk(cls).to_dict()
    return config_cls(**known)


def small_model(name: str) -> Any:
    """A random model of a class; raises whatever that does if its config cannot be shrunk so."""
    import torch
    import transformers

    cls = getattr(transformers, name)
    error: Exception | None = None
    for more in ({}, {"layer_types": ["full_attention"] * 2}, {"head_dim": None}):
        try:
            config = shrunk(cls.config_class, **more)
            with torch.device("meta"):
                size = sum(parameter.numel() for parameter in cls(config).parameters())
            if size > 20_000_000:
                raise ValueError(f"{size:,} parameters")
            torch.manual_seed(0)
            model = cls(config).eval()
            for parameter in model.parameters():
                parameter.data.normal_(0, 0.15)
            with torch.no_grad():
                logits = model(input_ids=torch.randint(3, 300, (2, 12))).logits
            if not logits.isfinite().all():
                raise ValueError("its logits are not finite")
            return model
        except Exception as found:
            error = error or found
    assert error is not None
    raise error


def judge(name: str, folder: Path) -> str:
    """What becomes of a class: "grows", "refused: …", "not built: …" or "WRONG: …"."""
    import torch

    from grow.checkpoint.consolidate import consolidate
    from grow.checkpoint.expand import expand
    from grow.errors import UserError
    from grow.model.loading import load

    torch.set_num_threads(1)
    base, grown, stock = (str(folder / end) for end in ("base", "grown", "stock"))
    try:
        model = small_model(name)
        cls = type(model)
        model.to(torch.bfloat16).save_pretrained(base)
    except Exception as error:
        return f"not built: {' '.join(str(error).split())[:100] or type(error).__name__}"
    ids = torch.randint(3, 300, (2, 12))

    def logits(path: str, dtype: Any, with_cls: Any = None) -> Any:
        loaded = load(path, dtype) if with_cls is None else with_cls.from_pretrained(path, dtype=dtype).eval()
        with torch.no_grad():
            return loaded(input_ids=ids).logits

    try:
        expand(base, grown)
        before = {dtype: logits(base, dtype, cls) for dtype in (torch.float32, torch.bfloat16)}
        same = [torch.equal(logits(grown, dtype), values) for dtype, values in before.items()]
        consolidate(grown, stock)
        apart = float((logits(stock, torch.float32, cls) - before[torch.float32]).abs().max())
    except UserError as error:
        return f"refused: {str(error).replace(base + ': ', '')}"
    except Exception as error:
        return f"WRONG: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return "grows" if all(same) and apart < 2e-3 else f"WRONG: exact {same}, stock apart by {apart:.2g}"


def judge_here(name: str, folder: Path) -> None:
    """Writes what becomes of a class, in a process of its own."""
    with (folder / "said").open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        verdict = judge(name, folder)
    (folder / "verdict").write_text(verdict)
    sys.exit()


def verdict(name: str, folder: Path) -> str:
    """What becomes of a class. One that takes two minutes is a large model."""
    folder.mkdir()
    process = FORKED.Process(target=judge_here, args=(name, folder))
    process.start()
    process.join(120)
    if process.is_alive():
        process.kill()
        process.join()
        return "not built: takes more than two minutes"
    there = folder / "verdict"
    return there.read_text() if there.exists() else "WRONG: " + (folder / "said").read_text().strip()[-200:]


def short(said: str) -> str:
    """A reason without what is the class's own in it."""
    reason = said.removeprefix("refused: ")
    for what in ("a mixture of experts", "incomplete", "what it does to copies", "no MLP in it", "writes no text"):
        if what in reason:
            return {"incomplete": "layers of several kinds", "what it does to copies": "more inside its MLP"}.get(
                what, what
            )
    return reason


def table(found: dict[str, str]) -> str:
    """The page's table: which classes grow, and which are refused for what."""
    rows: dict[str, list[str]] = {}
    for name, said in found.items():
        kind = (
            "grows" if said == "grows" else "could not be built small" if said.startswith("not built") else short(said)
        )
        rows.setdefault(kind, []).append(name.removesuffix("ForCausalLM").removesuffix("LMHeadModel"))
    return "\n".join(f"| {kind} | {len(own)} | {', '.join(own)} |" for kind, own in rows.items())


@pytest.mark.full
def test_each_class_grows_or_is_refused_in_one_line(tmp_path: Path) -> None:
    found = {name: verdict(name, tmp_path / name) for name in names()}
    print(table(found), *(f"{name}: {said}" for name, said in found.items() if said != "grows"), sep="\n")
    assert not {name: said for name, said in found.items() if said.startswith("WRONG")}
    assert all("\n" not in said for said in found.values())
    assert sum(said == "grows" for said in found.values()) >= 50
