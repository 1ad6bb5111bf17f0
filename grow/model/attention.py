"""Attention within packed rows: which implementation a run uses, and what it is told of where rows begin.

SDPA and FlexAttention get a mask of blocks, which transformers makes of the positions. Flash attention takes no mask
but the rows' cumulative lengths. transformers finds these from the positions for a batch of one sequence alone, and
lets the rows of several leak into each other silently; so sequences are laid end to end here, and lengths handed on.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available, is_torch_flex_attn_available

from grow.errors import UserError
from grow.recipe import AUTO

_AVAILABLE = {
    "sdpa": lambda: True,
    "eager": lambda: True,
    "flex_attention": is_torch_flex_attn_available,
    "flash_attention_2": is_flash_attn_2_available,
    "flash_attention_3": is_flash_attn_3_available,
}
IMPLEMENTATIONS = (AUTO, *_AVAILABLE)
_WIDEST_HEAD = 256
"""Features of the widest head that flash attention takes."""


def check_attention(wanted: str, cls: Any, config: Any) -> None:
    """Raises UserError for an implementation that there is not, or that a model of this class and config cannot use."""
    if wanted not in IMPLEMENTATIONS:
        raise UserError(f"attn_implementation {wanted}: there are {', '.join(IMPLEMENTATIONS)}")
    if wanted != AUTO and not _knows(cls, wanted):
        raise UserError(f"attn_implementation {wanted}: {cls.__name__} of transformers does not have it")
    if wanted.startswith("flash") and _width(config) > _WIDEST_HEAD:
        raise UserError(
            f"attn_implementation {wanted}: takes heads of {_WIDEST_HEAD} features at most, and {cls.__name__} has "
            f"{_width(config)}"
        )


def check_installed(wanted: str) -> None:
    """Raises UserError for an implementation that this machine does not have."""
    if wanted != AUTO and not _AVAILABLE[wanted]():
        raise UserError(f"attn_implementation {wanted}: is not installed here (or needs a GPU); auto takes what is")


def chosen_attention(wanted: str, model: Any, dtype: torch.dtype | None = None) -> str:
    """Returns the implementation that a model is to use, in a dtype that is its own unless given: for "auto" flash
    attention on a GPU where it is installed, in half precision and for heads that are not too wide, else what
    transformers takes. FlexAttention is taken where it is named."""
    if wanted != AUTO:
        return wanted
    half = (dtype or model.dtype) in (torch.bfloat16, torch.float16)
    if torch.cuda.is_available() and half and _width(model.config) <= _WIDEST_HEAD:
        for name in ("flash_attention_3", "flash_attention_2"):
            if _AVAILABLE[name]() and _knows(type(model), name):
                return name
    return str(model.config.get_text_config()._attn_implementation)


def set_attention(model: Any, wanted: str) -> None:
    """Lets a model use the implementation that is chosen for it: its language model, since towers for images and sound
    do not all know each, and text does not pass through them."""
    name, text = chosen_attention(wanted, model), model.config.get_text_config()
    if name != text._attn_implementation:
        model.set_attn_implementation(name if text is model.config else {"text_config": name})


def _width(config: Any) -> int:
    """Returns the features of a model's widest head; 0 where its config does not say."""
    text = config.get_text_config()
    return max(int(getattr(text, name, None) or 0) for name in ("head_dim", "global_head_dim"))


def _knows(cls: Any, name: str) -> bool:
    if name.startswith("flash") and not cls._can_set_attn_implementation():
        return False  # such as GPT-J's, whose own flash attention is not told of rows
    kind = "flash_attn" if name.startswith("flash") else "flex_attn" if name.startswith("flex") else name
    return bool(getattr(cls, f"_supports_{kind}", name == "eager"))


def laid_end_to_end(model: Any, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns a batch of packed sequences, [B, L] each, as the model's attention wants it, and what it is told besides:
    for flash attention one sequence, [1, B·L], and the lengths of its rows; else the batch as it is."""
    if "flash" not in str(getattr(model.config.get_text_config(), "_attn_implementation", "")):
        return batch, {}
    length = batch["input_ids"].shape[1]
    flat = {name: tensor.reshape(1, -1) for name, tensor in batch.items()}
    begins = flat["position_ids"][0] == 0
    begins[::length] = True
    places = begins.nonzero()[:, 0]
    ends = torch.cat((places, places.new_full((1,), len(begins)))).to(torch.int32)
    # No row is longer than a sequence; the longest one's own length would have to be waited for.
    return flat, {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": length, "max_length_k": length}
