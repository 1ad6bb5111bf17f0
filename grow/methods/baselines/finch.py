"""Plain fine-tuning at a rate that goes by each step's loss, after FINCH (Prashant et al. 2026, arXiv 2605.20005)."""

from dataclasses import dataclass
from math import sqrt

from grow.methods.sft import Sft


@dataclass
class Finch(Sft):
    """Fine-tunes with the rate η/√L in a step whose loss is L nats a label: what one step forgets is bounded by the
    rate times √L, so that every step may forget as much. The paper's own schedule may differ by more than a factor,
    which `learning_rate` has here.
    """

    least_loss: float = 0.1
    """A loss below that, in nats, counts as that: the rate would grow without bound."""

    def rate_factor(self, loss: float) -> float:
        """Returns 1/√L."""
        return 1 / sqrt(max(loss, self.least_loss))
