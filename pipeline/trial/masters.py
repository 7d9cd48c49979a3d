"""What the optimizer steps on: 32-bit values of the trained parameters, one by one or as one vector.

Small updates round to nothing in 16 bits. Adapters are hundreds of small matrices; on a GPU each cast, norm and update
of one is a kernel that takes longer to launch than to run, so that there one vector holds them all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import Parameter


class Masters:
    """A 32-bit copy of each low-precision parameter; a 32-bit parameter is its own.

    Attributes:
        copies: What the optimizer steps on.
    """

    def __init__(self, weights: Sequence[Parameter]):
        self.weights = list(weights)
        self.copies: list[torch.Tensor] = [
            weight if weight.dtype == torch.float32 else weight.detach().float().requires_grad_(True)
            for weight in weights
        ]

    def take_gradients(self) -> None:
        """Move the gradients of the parameters to the copies."""
        for weight, copy in zip(self.weights, self.copies, strict=True):
            if copy is not weight and weight.grad is not None:
                copy.grad, weight.grad = weight.grad.float(), None

    def drop_gradients(self) -> None:
        """Forget the gradients, once the optimizer has stepped."""
        for copy in self.copies:
            copy.grad = None

    @torch.no_grad()
    def give_back(self) -> None:
        """Round the copies into the parameters."""
        for weight, copy in zip(self.weights, self.copies, strict=True):
            if copy is not weight:
                weight.copy_(copy)

    def release(self) -> None:
        """Let go of the parameters, once no more steps follow."""
        self.drop_gradients()


class FlatMasters(Masters):
    """All parameters as views of one 32-bit vector, and their gradients of another; of each other type a vector beside.

    The gradients' memory is held from the first step to the last. A parameter that gets none has one of zeros, which
    AdamW without weight decay leaves as it is.
    """

    def __init__(self, weights: Sequence[Parameter]):
        self.weights = sorted(weights, key=lambda weight: (weight.dtype != torch.float32, str(weight.dtype)))
        self.master = torch.cat([weight.detach().float().flatten() for weight in self.weights]).requires_grad_(True)
        self.master.grad = torch.zeros_like(self.master)
        self.copies = [self.master]
        self._others: list[tuple[slice, torch.Tensor, torch.Tensor]] = []  # where, values, gradients
        start = 0
        for dtype in dict.fromkeys(weight.dtype for weight in self.weights):
            members = [weight for weight in self.weights if weight.dtype == dtype]
            here = slice(start, start + sum(weight.numel() for weight in members))
            values, gradients = self.master.detach()[here], self.master.grad[here]
            if dtype != torch.float32:
                values, gradients = values.to(dtype), gradients.to(dtype)
                self._others.append((here, values, gradients))
            at = 0
            for weight in members:
                part = slice(at, at + weight.numel())
                weight.data, weight.grad = values[part].view_as(weight), gradients[part].view_as(weight)
                at = part.stop
            start = here.stop

    @torch.no_grad()
    def take_gradients(self) -> None:
        """Cast the gradients of other types into the one vector."""
        for here, _, gradients in self._others:
            self._gradient[here] = gradients

    @torch.no_grad()
    def drop_gradients(self) -> None:
        """Set all gradients to zero."""
        for vector in (self._gradient, *(gradients for _, _, gradients in self._others)):
            vector.zero_()

    @torch.no_grad()
    def give_back(self) -> None:
        """Round the one vector into the parameters of other types."""
        for here, values, _ in self._others:
            values.copy_(self.master[here])

    def release(self) -> None:
        """Give each parameter memory of its own again, without a gradient."""
        for weight in self.weights:
            weight.data, weight.grad = weight.detach().clone(), None

    @property
    def _gradient(self) -> torch.Tensor:
        assert self.master.grad is not None
        return self.master.grad
