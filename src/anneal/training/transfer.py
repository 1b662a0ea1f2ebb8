"""Which layers learn at each step: the head alone at first, then the others at once or one by one from the head down."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from anneal.batching import RunPlan
from anneal.models.config import StartFromConfig
from anneal.models.transfer import freeze_steps
from anneal.optimizers.groups import module_layers, parameter_layers


def num_learning(step: int, num_layers: int, *, freeze_steps: int | None, gradually: bool) -> int:
    """Return how many layers learn at an optimizer step, counted from the head.

    Parameters
    ----------
    step
        The first is 0.
    num_layers
        Of the network, the head among them; at least 1.
    freeze_steps
        How long the head learns alone, at least 1; None: always.
    gradually
        One layer more each so many steps (Howard & Ruder 2018), not all at once.

    Examples
    --------
    >>> [num_learning(step, 4, freeze_steps=2, gradually=True) for step in range(8)]
    [1, 1, 2, 2, 3, 3, 4, 4]
    >>> [num_learning(step, 4, freeze_steps=2, gradually=False) for step in range(4)]
    [1, 1, 4, 4]
    """
    if freeze_steps is None or step < freeze_steps:
        return 1
    return min(num_layers, 1 + step // freeze_steps) if gradually else num_layers


class Freezing:
    """Freeze and wake the layers of a network: a function of the step, without a state of its own.

    A layer is what ``optimizer.lr_factors`` takes for one: a weight of two or more dimensions with the biases and norm layers
    that follow it, in module order. The parameters of a frozen one have no gradient when the optimizer steps, so that it
    passes them over (no update, no weight decay, no momentum); its batch norm layers normalise by their running statistics,
    which stay as they are.

    Parameters
    ----------
    network
        The last layer of it is the head.
    freeze_steps, gradually
        As for `num_learning`.
    """

    def __init__(self, network: nn.Module, *, freeze_steps: int | None, gradually: bool) -> None:
        self.freeze_steps = freeze_steps
        self.gradually = gradually
        self.parameters = {p: layer for p, layer in parameter_layers(network).items() if p.requires_grad}
        # One that tracks no statistics is frozen by itself.
        norms = [(layer, m) for layer, m in module_layers(network) if isinstance(m, _BatchNorm)]
        self.norms = [(layer, m) for layer, m in norms if m.track_running_stats]
        self.num_layers = 1 + max(self.parameters.values())
        self.learning = self.num_layers

    @property
    def wakes(self) -> bool:
        """Whether layers that are frozen at first learn later."""
        return self.freeze_steps is not None

    def set(self, step: int, *, skip_gradients: bool) -> bool:
        """Freeze and wake layers for an optimizer step.

        Parameters
        ----------
        step
            The first is 0.
        skip_gradients
            Do not even compute the gradients of frozen layers: where no other process waits for them.

        Returns
        -------
        bool
            Whether other layers learn than before.
        """
        number = num_learning(step, self.num_layers, freeze_steps=self.freeze_steps, gradually=self.gradually)
        changed, self.learning = number != self.learning, number
        for layer, norm in self.norms:
            # One that tracks nothing is passed over by what updates, freezes and recalibrates running statistics.
            norm.training = norm.track_running_stats = self._learns(layer)
        if changed and skip_gradients:
            for parameter, layer in self.parameters.items():
                parameter.requires_grad_(self._learns(layer))
        return changed

    def _learns(self, layer: int) -> bool:
        return layer >= self.num_layers - self.learning

    def awake(self) -> list[nn.Parameter]:
        """Return the parameters that learn."""
        return [parameter for parameter, layer in self.parameters.items() if self._learns(layer)]

    def drop_gradients(self) -> None:
        """Take the gradients of frozen parameters away."""
        for parameter, layer in self.parameters.items():
            if not self._learns(layer):
                parameter.grad = None

    def share(self) -> float:
        """Return the share of the network's trainable values that learn, in (0, 1]."""
        total = sum(parameter.numel() for parameter in self.parameters)
        return sum(parameter.numel() for parameter in self.awake()) / total

    def end(self) -> None:
        """Leave the network as one that learns in all its layers."""
        self.learning = self.num_layers
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        for _, norm in self.norms:
            norm.track_running_stats = True


def freezing(start_from: StartFromConfig, plan: RunPlan, network: nn.Module) -> Freezing | None:
    """Return what freezes the layers of a network as ``model.start_from`` says; None where all learn from the first step."""
    if start_from.path is None:
        return None
    steps = freeze_steps(start_from.freeze, total_steps=plan.total_steps, steps_per_epoch=plan.epoch_steps)
    if steps == 0:
        return None
    return Freezing(network, freeze_steps=steps, gradually=start_from.unfreeze == "gradually")


def head_names(network: nn.Module) -> set[str]:
    """Return the names of the parameters of the last layer, the classifier: weight and bias.

    >>> sorted(head_names(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))))
    ['1.bias', '1.weight']
    """
    layers = parameter_layers(network)
    last = max(layers.values())
    return {name for name, parameter in network.named_parameters() if layers[parameter] == last}
