"""Several skills on one base: each with its own growth, α and switch.

    y = base(x) + Σᵢ (fᵢ(x) − base(x))

fᵢ(x) is what an MLP with skill i alone computes (grow.model.mlp), at its α. The sum is over the skills that are on for
a token. Where none is, y is the base's, bit for bit; where one is alone, it is fᵢ(x) as it stands; and at each skill's
step 0 fᵢ(x) − base(x) is exactly 0.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from grow.model.layouts import mix_in, width
from grow.model.mlp import GrownBranch, planned_mlps, trained_base, up_projection, with_growth
from grow.plan import GrowthPlan


@dataclass
class Skill:
    """Holds what one skill is in one MLP beside its parameters: the factor k, α, and its switch, if it has one."""

    factor: int
    alpha: float
    switch: Any = None


class SkilledMLP:
    """Is mixed into the class of an MLP that is already there, so that the base's tensors keep their names.

    `grown` and `trained` have the parameters of each skill, by its name. `alpha` multiplies every skill's own.
    """

    alpha: float
    own_alpha: float = 1.0
    training: bool
    skills: dict[str, Skill]
    grown: nn.ModuleDict
    trained: nn.ModuleDict

    def forward(self, x: Tensor) -> Tensor:
        """Maps […, h] to […, h]."""
        own = super().forward(x)  # type: ignore[misc]
        on = {
            name: True if skill.switch is None else skill.switch.acts(self.training)
            for name, skill in self.skills.items()
        }
        on = {name: where for name, where in on.items() if where is not False and self.alpha * self.skills[name].alpha}
        if not on:
            return own
        if len(on) == 1 and all(where is True for where in on.values()):
            return self._alone(next(iter(on)), x, own)
        x_NH, own_NH = x.flatten(0, -2), own.flatten(0, -2)
        everywhere = torch.ones(len(x_NH), dtype=torch.bool, device=x.device)
        masks = {name: where.flatten() if isinstance(where, Tensor) else everywhere for name, where in on.items()}
        alone_N = torch.stack(list(masks.values())).sum(0) == 1
        y_NH = own_NH
        for name, mask_N in masks.items():
            places = mask_N.nonzero()[:, 0]
            sums = self._alone(name, x_NH[places], own_NH[places])
            # A sum and a difference would round; alone, a skill is what it is by itself.
            more = torch.where(alone_N[places, None], sums, y_NH[places] + (sums - own_NH[places]))
            y_NH = y_NH.index_put((places,), more)
        return y_NH.view_as(own)

    def _alone(self, name: str, x: Tensor, own: Tensor) -> Tensor:
        """Returns what the MLP makes of x, […, h], with one skill; `own` is what the base makes of it."""
        skill = self.skills[name]
        alpha = self.alpha * skill.alpha
        base = trained_base(self, self.trained[name], x, alpha) if name in self.trained else own
        return with_growth(self.grown[name](x), base, skill.factor, alpha)


def add_skills(model: nn.Module, plans: Mapping[str, GrowthPlan], alphas: Mapping[str, float]) -> None:
    """Gives a model the parameters of several skills, uninitialised, in place: `plans` and `alphas` by name."""
    for name, plan in plans.items():
        for layer, mlp in planned_mlps(model, plan, f"{name}: ").items():
            if not isinstance(mlp, SkilledMLP):
                mix_in(mlp, SkilledMLP, "Skilled")
                mlp.alpha, mlp.skills, mlp.grown, mlp.trained = 1.0, {}, nn.ModuleDict(), nn.ModuleDict()
            mlp.skills[name] = Skill(plan.factor, alphas[name] * plan.own_alpha(layer))
            mlp.grown[name] = GrownBranch(mlp, (plan.factor - 1) * width(mlp))
            if plan.trained_up:
                mlp.trained[name] = up_projection(mlp)
