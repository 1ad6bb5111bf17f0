"""Elastic weight consolidation: a penalty keeps weights that matter for retention near the base's."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor

from grow.errors import UserError
from grow.methods.method import Method
from grow.model.loss import labelled_logits, loss_sum


@dataclass
class Ewc(Method):
    """Fine-tunes with the penalty λ/2 Σ_i F_i (θ_i − θ*_i)², where θ* is the base and F the diagonal of its Fisher
    information (Kirkpatrick et al. 2017, "Overcoming catastrophic forgetting in neural networks", eq. 3).

    F is the empirical one: the mean of (∂ log p(completion) / ∂θ_i)² over the first `ewc_rows` rows of the recipe's
    `retention` data, from its split `ewc_split`; `eval` scores the split test. F (fp32) and θ* are kept on every rank,
    and parameters are compared in the dtype that they are computed with.
    """

    stages: ClassVar[tuple[int, ...]] = (0, 1, 2)  # under ZeRO-3 no parameter is whole where the penalty needs it

    ewc_lambda: float = 100.0
    ewc_rows: int = 200
    ewc_split: str = "train"

    def extra_bytes(self, shapes: dict[str, tuple[int, ...]], width: int) -> int:
        """Counts the bytes of F and θ*."""
        return (4 + width) * sum(prod(shape) for name, shape in shapes.items() if self.trains(name))

    def check(self, recipe: Any) -> None:
        """Raises UserError also where there are no retention rows."""
        super().check(recipe)
        if not recipe.retention:
            raise UserError(
                "ewc measures which weights the base's knowledge depends on: name rows of it in the field retention"
            )
        if self.ewc_rows < 1 or self.ewc_lambda < 0:
            raise UserError("ewc_rows must be at least 1, and ewc_lambda not below 0")
        self._examples(recipe)

    def texts_read(self, recipe: Any) -> list[str]:
        """Names the retention rows."""
        return [recipe.retention]

    def _examples(self, recipe: Any) -> Any:
        # Imported here because they import transformers and datasets, which reading a recipe does not need.
        from grow.data.of_recipe import retention_rows, retention_template, tokenizer_of
        from grow.data.tokens import encode

        rows = retention_rows(recipe, self.ewc_split)
        tokenizer = tokenizer_of(recipe)
        rows = rows.select(range(min(self.ewc_rows, len(rows))))
        examples = encode(rows, tokenizer, retention_template(recipe), recipe.max_length, end=False).examples
        if not examples:
            raise UserError(f"{recipe.retention}: its split {self.ewc_split} has no row of at most max_length tokens")
        return examples

    def begin(self, trainer: Any) -> None:
        """Keeps the base's parameters, and measures F with the rows shared out to the ranks."""
        examples = self._examples(trainer.recipe)
        parameters = [p for p in trainer.model.parameters() if p.requires_grad]
        fisher = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
        for example in examples[trainer.args.process_index :: trainer.args.world_size]:
            # Not backward(): DeepSpeed's hooks would take the gradients for those of a step.
            gradients = torch.autograd.grad(_row_loss(trainer, example), parameters)
            for total, gradient in zip(fisher, gradients, strict=True):
                total += gradient.float() ** 2 / len(examples)
        if trainer.args.world_size > 1:
            for total in fisher:
                torch.distributed.all_reduce(total)
        self.anchors = [(p, p.detach().clone(), f) for p, f in zip(parameters, fisher, strict=True)]

    def penalty(self) -> Tensor | float:
        """Returns the penalty at the present parameters."""
        return self.ewc_lambda / 2 * sum(squared_distance(*anchor) for anchor in self.anchors)


def _row_loss(trainer: Any, example: Any) -> Tensor:
    batch = {
        "input_ids": torch.tensor([example.input_ids]),
        "position_ids": torch.arange(len(example.input_ids))[None],
        "labels": torch.tensor([example.labels]),
    }
    batch = {name: tensor.to(trainer.args.device) for name, tensor in batch.items()}
    return loss_sum(*labelled_logits(trainer.model, batch))


def squared_distance(parameter: Tensor, start: Tensor, weights: Tensor) -> Tensor:
    """Returns Σ w (θ − θ*)² over a parameter, in fp32: three tensors of one shape, the weights fp32, give [].

    Autograd's own backward pass would keep and make several copies in fp32, four bytes a parameter each; this one goes
    by blocks and keeps none.
    """
    return _SquaredDistance.apply(parameter, start, weights)


class _SquaredDistance(torch.autograd.Function):
    """Computes the squared distance; its gradient d / d θ is 2 w (θ − θ*)."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return torch.stack([(w * (p.float() - s.float()).square()).sum() for p, s, w in _blocks(*tensors)]).sum()

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, None, None]:
        parameter = ctx.saved_tensors[0]
        parts = [(2 * scale * w * (p.float() - s.float())).to(p.dtype) for p, s, w in _blocks(*ctx.saved_tensors)]
        return torch.cat(parts).view_as(parameter), None, None


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(tensor.flatten().split(2**20) for tensor in tensors), strict=True)
