"""Compares two checkpoints bit for bit: runs both on the same tokens and compares every logit."""

import torch

from grow.data.tokenizer import load_tokenizer
from grow.model.loading import load
from grow.model.switched import SwitchedModel, set_switch

# Any text will do; this one is long enough for 200 tokens in any tokenizer.
TEXT = (
    "A language model that is fine-tuned on something narrow forgets much of what it knew, because the weights that "
    "held the old knowledge are the ones that are overwritten. A model that grows instead keeps them. At first its new "
    "neurons are copies of the old ones, and each contributes a half of what one contributed before, so that nothing "
    "at all has changed; then only the copies learn. En un mot : apprendre sans oublier. Die Hauptstadt von Frankreich "
    "ist Paris, 12 * 12 = 144, and `def add(a, b): return a + b` is a function. The seven colours of the rainbow are "
    "red, orange, yellow, green, blue, indigo and violet; water boils at 100 degrees Celsius at sea level; and the "
    "first ten prime numbers are 2, 3, 5, 7, 11, 13, 17, 19, 23 and 29. Many small steps lead further than one leap."
)


@torch.no_grad()
def compare_logits(path: str, base_path: str, device: str = "cpu", alpha: float = 1.0) -> dict[str, dict[str, float]]:
    """Compares two checkpoints' logits on one text, in fp32 and in bf16: {"float32": {"difference": 0.0, …}, …}.

    `difference` is the largest, 0.0 if and only if all are equal bit for bit (torch.equal); `largest` is the largest
    logit of the second checkpoint, for comparison. `alpha` is the first one's.
    """
    tokenizer = load_tokenizer(base_path)
    ids = tokenizer(TEXT, return_tensors="pt").input_ids.to(device)
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        models = [load(path, dtype, alpha).to(device), load(base_path, dtype).to(device)]
        if isinstance(models[0], SwitchedModel):  # it is the growth that is compared
            set_switch(models[0], "on")
        logits = [model(input_ids=ids, use_cache=False).logits for model in models]
        difference = 0.0 if torch.equal(*logits) else float((logits[0] - logits[1]).abs().max())
        found[str(dtype).removeprefix("torch.")] = {"difference": difference, "largest": float(logits[1].abs().max())}
    return found
