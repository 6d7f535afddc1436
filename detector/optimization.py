"""The optimiser: Adam as the paper has it, a subnet at a time, and its learning rate."""

import math
import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn

from config import Config
from model import Subnet

ADAM = {"betas": (0.8, 0.8), "eps": 1e-4, "weight_decay": 1e-5}  # the paper's (docs/method.md, section 4)


def make_optimizer(parameters: list[Tensor], config: Config) -> torch.optim.Adam:
    return torch.optim.Adam(parameters, lr=config.lr_init, fused=True, **ADAM)


def learning_rate(config: Config, progress: float) -> float:
    """The learning rate after the share ``progress`` (0 to 1) of all steps."""
    return config.lr_init * (
        0.5 * (1 + math.cos(math.pi * progress)) if config.lr_schedule == "cosine" else 1.0
    )


class SubnetAdam:
    """Adam, one per subnet: ``backward_and_step`` uses and drops the gradients of a subnet once all of them
    are there, while the backward pass goes on.

    The outcome is that of one Adam over all parameters, but the gradients of the whole flow are never held at
    once, which saves a quarter of the memory. Clipping needs them all: then it steps after the backward
    pass."""

    def __init__(self, flow: nn.Module, config: Config):
        subnets = [list(module.parameters()) for module in flow.modules() if isinstance(module, Subnet)]
        self.optimizers = [make_optimizer(parameters, config) for parameters in subnets]
        self.parameters = [parameter for parameters in subnets for parameter in parameters]
        self.max_norm = config.max_grad_norm
        self.missing = [len(parameters) for parameters in subnets]
        if not self.max_norm:
            for number, parameters in enumerate(subnets):
                self._step_when_complete(number, parameters)

    def _step_when_complete(self, number: int, parameters: list[Tensor]) -> None:
        weak = weakref.ref(self)  # the parameters outlive training, and must not keep Adam's moments

        def arrived(_: Tensor) -> None:
            if (optimizers := weak()) is not None:
                optimizers.count(number, len(parameters))

        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(arrived)

    def count(self, number: int, of: int) -> None:
        """One more gradient of the subnet ``number``, which has so many, is there."""
        self.missing[number] -= 1
        if self.missing[number] == 0:
            self._step_one(self.optimizers[number])
            self.missing[number] = of

    @staticmethod
    def _step_one(optimizer: torch.optim.Adam) -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def set_learning_rate(self, rate: float) -> None:
        for optimizer in self.optimizers:
            optimizer.param_groups[0]["lr"] = rate

    def backward_and_step(self, loss: Tensor) -> None:
        """One step of every parameter on a scalar loss."""
        loss.backward()
        if self.max_norm:
            nn.utils.clip_grad_norm_(self.parameters, self.max_norm)
            for optimizer in self.optimizers:
                self._step_one(optimizer)


def compiled(step: Callable) -> Callable:
    """A function or module as torch.compile makes it for many calls: with CUDA graphs where there is a
    GPU."""
    return torch.compile(step, mode="reduce-overhead" if torch.cuda.is_available() else "default")
