"""Plain fine-tuning: every parameter of the language model trains. The rival that forgets."""

from dataclasses import dataclass

from grow.methods.held import Held


@dataclass
class Sft(Held):
    """Nothing more than every method has, but that it can be held near the base too."""
