"""What norms and activations become: modules that keep their input, and compute again."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.autograd.function import Function

from velora_torch.recomputation.deferred import defer, plain
from velora_torch.recomputation.elementwise import Activation, activation_layout
from velora_torch.recomputation.replay import Autocast, can_replay, replay, run_with
from velora_torch.swap import Swapped


class Recomputed(Swapped):
    """A norm that keeps its input and parameters alone."""

    kind = "norm"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The original forward, run a second time in the backward pass."""
        args = tuple(plain(argument) for argument in args)
        parameters = {n: p for n, p in self._parameters.items() if p is not None}
        if kwargs or len(args) != 1 or not isinstance(args[0], Tensor):
            return super().forward(*args, **kwargs)
        if not can_replay(args[0], *parameters.values()):
            return super().forward(*args)
        return _Replayed.apply(
            self, self.plain_class, tuple(parameters), args[0], *parameters.values()
        )


class Deferring(Swapped):
    """An activation whose result is computed where it is used."""

    kind = "activation"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The result, deferred where autograd is on."""
        args = tuple(plain(argument) for argument in args)
        if kwargs or len(args) != 1 or not isinstance(args[0], Tensor):
            return super().forward(*args, **kwargs)
        x = args[0]
        if not can_replay(x) or not x.is_contiguous() or not x.is_floating_point():
            return super().forward(x)
        recipe = Activation(self, self.plain_class, Autocast.of(x))
        return defer(recipe, (x,), activation_layout(x, recipe))


class _Replayed(Function):
    """``y = module(x)`` that keeps x and the parameters."""

    @staticmethod
    def forward(
        ctx: Any,
        module: nn.Module,
        kind: type[nn.Module],
        names: tuple[str, ...],
        x: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        ctx.module, ctx.kind, ctx.names, ctx.autocast = module, kind, names, Autocast.of(x)
        ctx.save_for_backward(x, *parameters)
        return run_with(module, kind, _named(module, names, parameters), x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        def compute(x: Tensor, *parameters: Tensor) -> Tensor:
            named = _named(ctx.module, ctx.names, parameters)
            with ctx.autocast.again():
                return run_with(ctx.module, ctx.kind, named, x)

        needs = ctx.needs_input_grad[3:]
        return (None, None, None, *replay(compute, ctx.saved_tensors, needs, grad_outputs[0]))


def _named(
    module: nn.Module, names: tuple[str, ...], parameters: tuple[Tensor, ...]
) -> dict[str, Any]:
    return {**module._parameters, **dict(zip(names, parameters, strict=True))}
