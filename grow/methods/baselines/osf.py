"""Orthogonal subspace fine-tuning: each weight's strongest singular directions stay, the others train beside them."""

import operator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from grow.checkpoint.dtypes import Rows
from grow.checkpoint.lazy import LazyTensor, elementwise
from grow.errors import UserError
from grow.methods.peft_method import PeftMethod


@dataclass
class Osf(PeftMethod):
    """Splits W = U S V at a share `osf_kept` of the singular values, counted from the largest, as PEFT does it: the
    part above is frozen; U, S and V of the part below train, their gradients projected to be orthogonal to the frozen
    part ("Sculpting Subspaces", arXiv 2504.07097).

    PEFT computes W x + (U' S' V' − U S V) x, in which the term in brackets is zero at step 0 only up to rounding.
    Gradients are orthogonal; Adam's steps, scaled element by element, are not: a third of U's change can lie in the
    frozen subspace.
    """

    averages: ClassVar[bool] = False
    part: ClassVar[str] = ".osf_svd_params."
    stages: ClassVar[tuple[int, ...]] = (0, 1, 2)  # PEFT decomposes whole weights; ZeRO-3 has cut them

    osf_kept: float = 0.5

    def check(self, recipe: Any) -> None:
        """Raises UserError also for an invalid share."""
        super().check(recipe)
        if not 0 < self.osf_kept < 1:
            raise UserError(f"osf_kept {self.osf_kept:g}: a share of the singular values is needed, between 0 and 1")

    def config(self, target_modules: list[str], count: int = 1) -> Any:
        """Returns PEFT's OSFConfig."""
        from peft import OSFConfig

        return OSFConfig(effective_rank=self.osf_kept, target_modules=target_modules, task_type="CAUSAL_LM")

    def parts(self, out_features: int, in_features: int) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of U, S and V: of the stronger directions, which are frozen, and of the weaker."""
        rank = min(out_features, in_features)
        kept = int(rank * self.osf_kept)
        found: dict[str, tuple[int, ...]] = {}
        for end, count in ((".osf_high.", kept), (self.part, rank - kept)):
            found |= {f"{end}U": (out_features, count), f"{end}S": (count,), f"{end}V": (count, in_features)}
        return found

    def merged(self, own: LazyTensor, parts: dict[str, LazyTensor], dtype: str) -> LazyTensor:
        """Returns W + U' S' V' − U S V. PEFT does not save U S V, so it is computed again."""
        u, s, v = (parts[f"osf_svd_params.{name}_low"] for name in "USV")

        def update(begin: int, end: int) -> Rows:
            trained = u.rows(begin, end) * s.rows(0, s.length) @ v.rows(0, v.length)
            return trained - _weak_part(own, self.osf_kept, dtype)[begin:end].numpy()

        return elementwise(operator.add, "F32", own, LazyTensor(own.shape, "F32", update))


@lru_cache(maxsize=4)  # weights are read in blocks of rows, by about as many threads
def _weak_part(weight: LazyTensor, kept: float, dtype: str) -> Tensor:
    """Returns U S V of the weaker singular values, [out, in] fp32, from factors rounded as PEFT rounds them."""
    rounded = getattr(torch, dtype.removeprefix("torch."))
    u, s, v = torch.linalg.svd(weight.load().to(rounded).float(), full_matrices=False)
    first = int(len(s) * kept)
    u, s, v = (part.to(rounded).float() for part in (u[:, first:], s[first:], v[first:]))
    return u * s @ v
