"""Ways to train, one file each. A method says whether it starts from a grown checkpoint (GROWS) and, in `prepare`,
which parameters train: the others get requires_grad=False before DeepSpeed sees the model."""

from grow.methods import g_freeze, sft

METHODS = {"g_freeze": g_freeze, "sft": sft}
