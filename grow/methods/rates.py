"""The default learning rate, by method and by the size of the base.

Up to half a billion parameters it is the best one in recipes/study and in the 270M's recipes; above that it is
extrapolated from these, and untested.
"""

from grow.errors import UserError

_SMALL = 500_000_000
_RATES = {
    "g_freeze": (5e-5, 5e-5),
    "g_train": (5e-5, 5e-5),
    "g_lora": (1e-3, 5e-4),
    "sft": (2e-5, 1e-5),
    "lora": (3e-4, 2e-4),
    "adapter": (3e-4, 2e-4),
    "blocks": (5e-5, 5e-5),
    "disel": (3e-4, 2e-4),
    "ewc": (2e-5, 1e-5),
    "finch": (2e-5, 1e-5),
    "flow": (2e-5, 1e-5),
    "osf": (2e-5, 1e-5),
    "stm": (2e-5, 1e-5),
}


def default_rate(method: str, parameters: int, times: float = 1.0) -> float:
    """Returns the rate for a base of so many parameters; growth that trains what it adds takes it so many times as high
    (Part.rate of what grows). Raises UserError for a method that has none."""
    if method not in _RATES:
        raise UserError(f"learning_rate: there is no default for {method}; give one")
    rate = _RATES[method][parameters > _SMALL]
    return rate * times if method in ("g_freeze", "g_train") else rate
