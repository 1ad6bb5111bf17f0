"""Ways to train, one file each, behind the interface of grow.methods.method. They import what is heavy when used."""

from grow.methods.adapter import Adapter
from grow.methods.ewc import Ewc
from grow.methods.flow import Flow
from grow.methods.g_freeze import GFreeze
from grow.methods.g_lora import GLora
from grow.methods.g_train import GTrain
from grow.methods.lora import Lora
from grow.methods.method import Method
from grow.methods.osf import Osf
from grow.methods.sft import Sft
from grow.methods.stm import Stm

METHODS: dict[str, type[Method]] = {
    "adapter": Adapter,
    "ewc": Ewc,
    "flow": Flow,
    "g_freeze": GFreeze,
    "g_lora": GLora,
    "g_train": GTrain,
    "lora": Lora,
    "osf": Osf,
    "sft": Sft,
    "stm": Stm,
}
