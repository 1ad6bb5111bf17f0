"""Several skills on one base: each with its own growth, α and switch.

    y = base(x) + Σᵢ (fᵢ(x) − base(x))

fᵢ(x) is what an MLP, or an attention, with skill i alone computes (grow.model.mlp), at its α. The sum is over the
skills that are on for a token. Where none is, y is the base's, bit for bit; where one is alone, it is fᵢ(x) as it
stands; and at each skill's step 0 fᵢ(x) − base(x) is exactly 0.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from grow.errors import UserError
from grow.model.attention_heads import SameKeys
from grow.model.grown import planned_parts
from grow.model.layouts import mix_in, stock_class, width
from grow.model.mlp import Between, GrownBranch, trained_base, up_projection, with_growth
from grow.parts import parts_of
from grow.plan import GrowthPlan


@dataclass
class Skill:
    """Holds what one skill is in one MLP beside its parameters: the factor k, α, and its switch, if it has one."""

    factor: int
    alpha: float
    switch: Any = None


class Skilled:
    """Is mixed into the class of an MLP or an attention that is already there, so that the base's tensors keep their
    names.

    `grown` and `trained` have the parameters of each skill, by its name. `alpha` multiplies every skill's own.
    """

    alpha: float
    own_alpha: float = 1.0
    training: bool
    skills: dict[str, Skill]
    grown: nn.ModuleDict
    trained: nn.ModuleDict

    def on(self, x: Tensor) -> dict[str, bool | Tensor]:
        """Returns where the skills are on that are on anywhere in x, [B, L, …]: True, or bool [B, L]."""
        on = {
            name: True if skill.switch is None else skill.switch.acts(self.training, x)
            for name, skill in self.skills.items()
        }
        return {
            name: where for name, where in on.items() if where is not False and self.alpha * self.skills[name].alpha
        }


class SkilledMLP(Skilled):
    """An MLP with several skills."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps […, h] to […, h]."""
        own, on = super().forward(x), self.on(x)  # type: ignore[misc]
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


class SkilledAttention(Skilled):
    """An attention whose query heads have grown for several skills; all use the base's keys and values."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Maps […, h] to […, h], and what else the class returns, of the base's own heads."""
        if kwargs.get("past_key_values") is not None:
            kwargs["past_key_values"] = SameKeys(kwargs["past_key_values"])

        def attend(heads: Any) -> Any:
            return stock_class(self).forward(heads, hidden_states, *args, **kwargs)

        own, *others = attend(self)
        on, y = self.on(hidden_states), own
        count = sum(where.long() if isinstance(where, Tensor) else 1 for where in on.values())
        alone = count == 1 if isinstance(count, int) else (count == 1)[..., None].to(own.device)
        for name, where in on.items():
            skill = self.skills[name]
            alpha = self.alpha * skill.alpha
            base = attend(Between(self, self.trained[name], alpha))[0] if name in self.trained else own
            sums = with_growth(attend(self.grown[name])[0], base, skill.factor, alpha)
            if alone is not True:  # as it is by itself, in the bits too
                more = y + (sums - own)
                sums = more if alone is False else torch.where(alone, sums, more)
            y = torch.where(where[..., None].to(own.device), sums, y) if isinstance(where, Tensor) else sums
        return y, *others


_SKILLED = {"units": SkilledMLP, "heads": SkilledAttention}


def add_skills(model: nn.Module, plans: Mapping[str, GrowthPlan]) -> None:
    """Gives a model the parameters of several skills, uninitialised, in place, by their plans. Raises UserError where
    one does not fit, or cannot stand beside others."""
    for name, plan in plans.items():
        for part, where in parts_of(plan):
            if part.must_be_alone(where):
                raise UserError(f"{name}: {part.must_be_alone(where)}")
        for part, modules in planned_parts(model, plan, f"{name}: "):
            for layer, module in modules.items():
                _add(module, _SKILLED[part.made_of], name, plan, plan.own_alpha(part.name, layer))


def _add(part: Any, kind: type[Skilled], name: str, plan: GrowthPlan, alpha: float) -> None:
    """Gives an MLP, or an attention, the parameters of one skill more."""
    if not isinstance(part, kind):
        mix_in(part, kind, "Skilled")
        part.alpha, part.skills, part.grown, part.trained = 1.0, {}, nn.ModuleDict(), nn.ModuleDict()
    part.skills[name] = Skill(plan.factor, alpha)
    part.grown[name] = GrownBranch(part, (plan.factor - 1) * width(part)).train(part.training)
    if plan.trained_up:
        part.trained[name] = up_projection(part)
