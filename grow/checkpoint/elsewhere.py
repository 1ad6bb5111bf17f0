"""Where stock checkpoints go: what is known not to work there, and what has been tried."""

from collections.abc import Iterable
from typing import Any

from grow.errors import UserError
from grow.plan import setting, text_config

PROGRAMS = ("llama.cpp", "vllm")
TRIED = ("gemma3_text", "gemma3")
"""Kinds of model (model_type) of which grown ones have written the same tokens there, the latter of images as well
(checkpoint/test_elsewhere.py)."""
_TOWER_IN_FILES = {"gemma3": "vision_tower.vision_model."}
"""What names of a tower's tensors begin with where vLLM reads them, by kind of model."""
_SCALED_BY_WIDTH = {"gemma2": 46, "gemma3_text": 62}
"""Kinds of model, and the number of layers by which llama.cpp takes one for a 27B."""


def check_program(program: str, path: str, config: dict[str, Any], names: Iterable[str] = ()) -> str:
    """Returns a note on how a stock checkpoint with this config and tensors of these names fares in a program, for
    `path`, which it is made of. Raises UserError for one that would be loaded and compute something else."""
    if program not in PROGRAMS:
        raise UserError(f"--for {program}: there are {' and '.join(PROGRAMS)}")
    text = text_config(config)
    kind, heads, width = text.get("model_type"), text.get("num_attention_heads"), setting(text, "hidden_size")
    scalar = text.get("query_pre_attn_scalar")
    # src/llama-model.cpp: f_attention_scale of LLM_TYPE_27B is 1/√(n_embd / n_head), of others 1/√n_embd_head_k.
    by_width = setting(text, "num_hidden_layers") == _SCALED_BY_WIDTH.get(str(kind))
    if program == "llama.cpp" and by_width and heads and width and scalar and width // heads != scalar:
        raise UserError(
            f"{path}: llama.cpp scales the attention of a 27B by hidden_size ÷ num_attention_heads, {width // heads} "
            f"with {heads} heads, where it is {scalar:g}: heads that have grown compute something else there; use "
            "vllm, or grow MLPs"
        )
    untied = False in (text.get("tie_word_embeddings"), config.get("tie_word_embeddings"))
    if program == "llama.cpp" and untied and str(kind).startswith("gemma"):
        # Its converter leaves out lm_head.weight of every Gemma.
        raise UserError(
            f"{path}: has a head of its own beside the embedding, which has trained, and llama.cpp takes a Gemma's "
            "embedding for its head; grow something else for it"
        )
    kind = config.get("model_type") if "vision_config" in config else kind
    begin = _TOWER_IN_FILES.get(str(kind))
    if program == "vllm" and begin and not any(name.startswith(begin) for name in names):
        return (
            f"vllm: looks for the tower's tensors as {begin}…, as the hub has them; {path} has them under the names of "
            "newer saves"
        )
    return "" if kind in TRIED else f"{program}: no grown {kind} has been tried there"
