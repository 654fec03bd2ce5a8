"""Operators of torch that take half the host's time of `torch.library.custom_op`.

The steps are those of a custom operator: a schema, a kernel for every device, and an autograd function where an
argument needs a gradient. Two are left out. Custom operators check that no result shares memory with an argument or
another result, which opcheck does in the tests; and they search for default values, which these schemas do not have.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

LIBRARY = torch.library.Library("loglinear", "FRAGMENT")


class Operator:
    """A function of tensors and numbers as one node `loglinear::name`; torch.compile does not look inside."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.name, self.kernel, self.__doc__ = function.__name__, function, function.__doc__
        schema = torch.library.infer_schema(function, mutates_args=())
        if "=" in schema:  # the dispatcher would hide a default value from the autograd function
            raise TypeError(f"{self.name} must have no default values, got {schema}")
        LIBRARY.define(self.name + schema, tags=[torch.Tag.pt2_compliant_tag])
        # The kernel is looked up anew: tests of what is around an operator put another in its place.
        run = torch._disable_dynamo(lambda *arguments: self.kernel(*arguments))
        LIBRARY.impl(self.name, run, "CompositeExplicitAutograd")
        self.node = getattr(torch.ops.loglinear, self.name).default

    def __call__(self, *arguments: Any) -> Any:
        return self.node(*arguments)

    def register_fake(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        torch.library.register_fake(f"loglinear::{self.name}", fake, lib=LIBRARY)
        return fake

    def register_autograd(self, backward: Callable[..., Any], save: Callable[..., None]) -> None:
        """`save(ctx, arguments, results)` follows a call, `backward(ctx, *gradients)` returns one for each argument."""
        node, below = self.node, torch._C._AutoDispatchBelowAutograd

        def redispatch(keys: Any, *arguments: Any) -> Any:
            with below():
                return node.redispatch(keys & torch._C._after_autograd_keyset, *arguments)

        class Node(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, keys: Any, *arguments: Any) -> Any:
                results = redispatch(keys, *arguments)
                save(ctx, arguments, results)
                return results

            @staticmethod
            def backward(ctx: Any, *gradients: Any) -> Any:
                return None, *backward(ctx, *gradients)

        def call(keys: Any, *arguments: Any) -> Any:
            needs_gradient = torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments)
            return (Node.apply if needs_gradient else redispatch)(keys, *arguments)

        Node.__name__ = Node.__qualname__ = f"{self.name}_backward"
        LIBRARY.impl(self.name, call, "Autograd", with_keyset=True)
