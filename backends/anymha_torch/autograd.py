"""Gradients: pulled back, and through loops that keep no more than what goes into a round."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from anymha_torch.modes import transformed

Tensors = Sequence[torch.Tensor]


def any_differentiated(tensors: Tensors) -> bool:
    """Whether a gradient of any of them is wanted."""
    return any(tensor.requires_grad for tensor in tensors)


class Loop:
    """Calls of a function with one part after another of some tensors.

    Args:
        function: Takes the round's number and tensors by name, and gives tensors by name.
        count: How many rounds.
        mapped: Tensors of which the i-th round gets the i-th part.
        constant: Tensors that each round gets whole.
        results: The names of what the function gives.
    """

    def __init__(
        self,
        function: Callable[[int, dict[str, torch.Tensor]], dict[str, torch.Tensor]],
        count: int,
        mapped: Mapping[str, Any],
        constant: Mapping[str, Any],
        results: Mapping[str, Any],
    ) -> None:
        self.function, self.count, self.wanted = function, count, list(results)
        self.names, self.parted = [*mapped, *constant], len(mapped)

    def round(self, index: int, arrays: Tensors) -> list[torch.Tensor]:
        """The results of one round."""
        return self._called(index, self._parts(index, arrays))

    def results(self, arrays: Tensors) -> list[torch.Tensor]:
        """The results of all rounds, one after the other."""
        gathered: list[torch.Tensor] = []
        for index in range(self.count):
            found = self.round(index, arrays)
            gathered = gathered or [x.new_empty((self.count, *x.shape)) for x in found]
            for whole, x in zip(gathered, found, strict=True):
                whole[index] = x
        return gathered

    def gradients(
        self, arrays: Tensors, cotangents: Tensors, needed: Sequence[bool]
    ) -> list[torch.Tensor | None]:
        """The gradients of the tensors, None where it is not needed."""
        again = torch.is_grad_enabled()  # somebody differentiates the gradients
        places = [i for i, need in enumerate(needed) if need]
        pieces: dict[int, list[torch.Tensor]] = {i: [] for i in places}
        for index in range(self.count):
            own = self._parts(index, arrays)
            if not again:
                own = [x.detach().requires_grad_(i in pieces) for i, x in enumerate(own)]
            with torch.enable_grad():
                outputs = self._called(index, own)
            pulled = torch.autograd.grad(
                outputs, [own[i] for i in places], [c[index] for c in cotangents],
                create_graph=again, allow_unused=True, materialize_grads=True,
            )  # fmt: skip
            for i, gradient in zip(places, pulled, strict=True):
                if i < self.parted or not pieces[i]:
                    pieces[i].append(gradient)
                else:
                    pieces[i][0] = pieces[i][0] + gradient
        whole = {i: torch.stack(p) if i < self.parted else p[0] for i, p in pieces.items()}
        return [whole.get(i) for i in range(len(arrays))]

    def _parts(self, index: int, arrays: Tensors) -> list[torch.Tensor]:
        return [x[index] if i < self.parted else x for i, x in enumerate(arrays)]

    def _called(self, index: int, parts: Tensors) -> list[torch.Tensor]:
        found = self.function(index, dict(zip(self.names, parts, strict=True)))
        return [found[name] for name in self.wanted]


class Recomputed(torch.autograd.Function):
    """The results of a loop, whose rounds are computed again for the gradients."""

    @staticmethod
    def forward(ctx: Any, loop: Loop, *arrays: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.loop = loop
        ctx.save_for_backward(*arrays)
        return tuple(loop.results(arrays))

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> Any:
        needed = ctx.needs_input_grad[1:]
        return None, *ctx.loop.gradients(ctx.saved_tensors, cotangents, needed)


def loop(
    function: Callable[[int, dict[str, torch.Tensor]], dict[str, torch.Tensor]],
    count: int,
    mapped: Mapping[str, Any],
    constant: Mapping[str, Any],
    results: Mapping[str, Any],
    /,
) -> dict[str, torch.Tensor]:
    """``function(i, tensors)`` for each i below `count`; see `anymha.framework.capabilities`."""
    rounds = Loop(function, count, mapped, constant, results)
    arrays = [*mapped.values(), *constant.values()]
    if torch.compiler.is_compiling() or transformed():
        parts = zip(*(rounds.round(index, arrays) for index in range(count)), strict=True)
        stacked = [torch.stack(x) for x in parts]
    elif torch.is_grad_enabled() and any_differentiated(arrays):
        stacked = Recomputed.apply(rounds, *arrays)
    else:
        stacked = rounds.results(arrays)
    return dict(zip(results, stacked, strict=True))


def vjp(
    function: Callable[[dict[str, torch.Tensor]], Any],
    arrays: Mapping[str, torch.Tensor],
    cotangents: Any,
    /,
) -> tuple[Any, dict[str, torch.Tensor]]:
    """The value and the gradients of a function; see `anymha.framework.protocol.Differentiable`."""
    leaves = {name: array.detach().requires_grad_() for name, array in arrays.items()}
    outputs = function(leaves)
    pulled = torch.autograd.grad(_as_tuple(outputs), list(leaves.values()), _as_tuple(cotangents))
    return outputs, dict(zip(leaves, pulled, strict=True))


def _as_tuple(x):
    return x if isinstance(x, tuple) else (x,)
