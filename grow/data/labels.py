"""The label of a token that is not learnt, as torch's cross-entropy has it. It stands alone: models need no more of the
data than this."""

IGNORED = -100
