"""The dense teacher of a fine-tune: the same network, patch off, with the weights it began with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from retrofit.patching.patch import Patch


class Teacher:
    """A frozen copy of what is trained, swapped in for as long as the teacher runs.

    Weights that are not trained are shared, so that its outputs are the dense model's bit for bit.
    """

    def __init__(self, patch: Patch, trained: Mapping[str, nn.Parameter]) -> None:
        """Copy what is trained, as it is now.

        Args:
            patch: What is switched off.
            trained: Parameters that the optimizer changes, by name.
        """
        self.patch = patch
        self.trained = dict(trained)
        self.frozen = {name: p.detach().clone() for name, p in self.trained.items()}

    @contextmanager
    def active(self) -> Iterator[None]:
        """While entered, the network is the teacher; no gradients are recorded."""
        with swapped(self.trained, self.frozen), self.patch.disabled(), torch.no_grad():
            yield


@contextmanager
def swapped(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> Iterator[None]:
    """While entered, parameters hold other values, without a copy."""
    own = {name: parameter.data for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        parameter.data = values[name]
    try:
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = own[name]
