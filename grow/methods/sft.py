"""Plain fine-tuning: every parameter of the language model trains. The rival that forgets."""

from dataclasses import dataclass

from grow.methods.method import Method


@dataclass
class Sft(Method):
    """Nothing more than every method has."""
