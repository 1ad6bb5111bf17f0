"""No walk through all modules and parameters in a micro-batch that changes nothing.

Trainer sets the model to training mode before each micro-batch, and clears gradients after each step that ZeRO's
optimizer has cleared already; DeepSpeed 0.19.8 goes through every module and every parameter for both.
"""

from typing import Any


def fewer_walks(engine: Any) -> None:
    """Makes an engine skip them, in place."""
    train, trained = engine.train, [parameter for parameter in engine.module.parameters() if parameter.requires_grad]

    def train_where_it_is_not(mode: bool = True) -> None:
        if engine.module.training != mode:
            train(mode)

    def zero_trained() -> None:
        for parameter in trained:
            parameter.grad = None

    engine.train, engine.zero_grad = train_where_it_is_not, zero_trained
