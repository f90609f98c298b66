"""A model once more, over the same weights, with parameters of its own: what a capture differentiates by.

Autograd remembers of a parameter the stream on which it was first used, and a backward makes that stream wait: one that
is captured may not. Nor are hooks on the gradients of the model's own parameters any business of a capture.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from siglip2_packed.ops.runtime.check import Refused


class Shadow:
    """Modules are shared in all but their parameters and children.

    Attributes:
        model: the shadow.
    """

    def __init__(self, model: nn.Module):
        self._modules: dict[int, nn.Module] = {}
        self._parameters: dict[int, nn.Parameter] = {}
        self._real: dict[int, nn.Parameter] = {}
        self.model: Any = self._module(model)

    def real(self, parameter: nn.Parameter) -> nn.Parameter:
        """The model's own, of one of the shadow's."""
        return self._real[id(parameter)]

    def check(self, out: Tensor) -> None:
        """Raises `Refused` if a parameter that is none of the shadow's, which nobody would look for, has led to out."""
        if any(isinstance(leaf, nn.Parameter) and id(leaf) not in self._real for leaf in _leaves(out)):
            raise Refused("a parameter is used otherwise than as a module's own, so its gradient cannot be captured")

    def _module(self, module: nn.Module) -> nn.Module:
        if id(module) not in self._modules:
            shadow = self._modules[id(module)] = object.__new__(type(module))  # parametrised ones refuse copy.copy
            shadow.__dict__.update(module.__dict__)
            shadow.__dict__["_parameters"] = {name: self._parameter(p) for name, p in module._parameters.items()}
            shadow.__dict__["_modules"] = {
                name: None if child is None else self._module(child) for name, child in module._modules.items()
            }
        return self._modules[id(module)]

    def _parameter(self, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None:
            return None
        if id(parameter) not in self._parameters:
            shadow = nn.Parameter(parameter.detach(), parameter.requires_grad)
            self._parameters[id(parameter)], self._real[id(shadow)] = shadow, parameter
        return self._parameters[id(parameter)]


def _leaves(out: Tensor) -> Iterator[Tensor]:
    """Those that autograd would reach from here."""
    seen, nodes = set(), [out.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        nodes += [parent for parent, _ in node.next_functions]
