"""All classes of a data set trained at once: their flows stacked into one batched model, each with the
outcome it has alone.

A step then costs one kernel per layer instead of one per layer and class, which is what keeps a GPU busy with
flows this small. Every class keeps its own trainer: its own batches, noise, history and choice of epoch. Only
the step is shared."""

import copy
import time

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call, stack_module_state

import model
from arithmetic import forward_precision, products
from train import Fitted, Trainer, compiled, make_optimizer


class BatchedTrainer:
    """Trains G classes that have the same number of training images. ``run`` gives what each class's own
    ``Trainer.run`` would."""

    def __init__(self, trainers: list[Trainer]):
        self.trainers, self.config = trainers, trainers[0].config
        self.source = trainers[0].data.train  # of all of them
        flows = [trainer.detector.flow for trainer in trainers]
        self.parameters, _ = stack_module_state(flows)  # {name: (G, ...)}
        for g, flow in enumerate(flows):
            for name, parameter in flow.named_parameters():
                parameter.data = self.parameters[name].data[g]  # each class's flow now looks at its slice
        self.buffers = dict(flows[0].named_buffers())  # permutations and grids: the same for all classes
        self.flow = copy.deepcopy(flows[0]).to("meta")
        losses = torch.vmap(self._loss)
        self.losses = compiled(losses) if self.config.compile_flow else losses
        self.optimizer = make_optimizer(list(self.parameters.values()), self.config)

    def run(self) -> list[Fitted]:
        start, config = time.perf_counter(), self.config
        for trainer in self.trainers:
            trainer.evaluate_start()
        for meta_epoch in range(1, config.meta_epochs + 1):
            for _ in range(self.trainers[0].sub_epochs):
                losses = self.train_epoch()
            for trainer, loss in zip(self.trainers, losses.tolist()):
                if (
                    not trainer.has_ended()
                ):  # alone it would have stopped: what follows is not its own any more
                    trainer.evaluate(meta_epoch * trainer.sub_epochs, loss)
            if all(trainer.has_ended() for trainer in self.trainers):
                break
        self._part()
        seconds = (time.perf_counter() - start) / len(self.trainers)
        return [trainer.fitted(seconds) for trainer in self.trainers]

    def _part(self) -> None:
        """Give every class parameters of its own: a copy of a view would copy the whole stack."""
        for trainer in self.trainers:
            for parameter in trainer.detector.flow.parameters():
                parameter.data = parameter.data.clone()

    def train_epoch(self) -> Tensor:
        """One pass over every class's training images -> mean losses (G)."""
        batches = list(zip(*(trainer.shuffled_batches() for trainer in self.trainers)))
        with products(self.config.matmul, self.trainers[0].device):
            losses = [self.train_step(batch) for batch in self.trainers[0].progress(batches)]
        return torch.stack(losses).mean(0)

    def train_step(self, batches: tuple) -> Tensor:
        """One Adam step for all classes, each on its own batch of rows -> losses (G), detached."""
        for trainer in self.trainers:  # all at the same step
            self.optimizer.param_groups[0]["lr"] = trainer.scheduled_rate()
        rows = torch.cat(batches) if isinstance(batches[0], Tensor) else np.concatenate(batches)
        features = self.source[rows].split(len(batches[0]))  # one gather for all classes
        inputs = [trainer.inputs(part) for trainer, part in zip(self.trainers, features)]
        semantic, patches = (torch.stack(tokens) for tokens in zip(*inputs))  # (G, B, C), (G, B, N, C)
        with forward_precision(self.config.matmul, semantic.device):
            losses = self.losses(self.parameters, semantic, patches)
        self.optimizer.zero_grad(set_to_none=True)
        losses.sum().backward()  # no class's loss depends on another's parameters
        if self.config.max_grad_norm:
            self._clip()
        self.optimizer.step()
        losses = losses.detach()
        for trainer, loss in zip(self.trainers, losses):
            trainer.count_step(loss)
        return losses

    def _loss(self, parameters: dict[str, Tensor], semantic: Tensor, patches: Tensor) -> Tensor:
        z, log_det = functional_call(self.flow, (parameters, self.buffers), (semantic, [patches]))
        return model.loss_per_image(z, log_det).mean()

    def _clip(self) -> None:
        """``clip_grad_norm_`` for each class separately."""
        gradients = [parameter.grad for parameter in self.parameters.values()]
        norms = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in gradients]).norm(dim=0)  # (G)
        factors = (self.config.max_grad_norm / (norms + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            gradient.mul_(factors.view(-1, *[1] * (gradient.dim() - 1)))


def groups(trainers: list[Trainer]) -> list[list[Trainer]]:
    """Trainers that can train together: the same number of training images, and no more than the device's
    memory holds."""
    by_size: dict[int, list[Trainer]] = {}
    for trainer in trainers:
        by_size.setdefault(len(trainer.data.fit_rows), []).append(trainer)
    device = trainers[0].device
    most = len(trainers)
    if device.type == "cuda":
        most = at_once(trainers[0].bytes, torch.cuda.mem_get_info(device)[0])
    return [group[i : i + most] for group in by_size.values() for i in range(0, len(group), most)]


def at_once(one: int, free: int) -> int:
    """How many classes of ``one`` bytes each train together in ``free`` bytes: at least one, and a third of
    the memory is left for what was not counted."""
    return max(1, int(0.67 * free / one))
