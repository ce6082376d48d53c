"""The fast path: a linear layer whose weight gradient is the factor C = dYᵀ z.

    dW[o, g, m] = sum_t dY[t, o] z[t, g] v[g, m] = C[o, g] v[g, m]

The reconstructed input never exists, and with ``gradient="factored"`` neither does dW.

Shapes: T tokens, D input features, G groups, M features per sub-token, O output features.
A weight is stored (O, D) as in ``nn.Linear``, or ``transposed`` (D, O) as in GPT-2's ``Conv1D``.
"""

from __future__ import annotations

import warnings
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import Function
from torch.nn import Parameter
from torch.nn import functional as F


def project(x: Tensor, v_GM: Tensor, shared: bool = False) -> Tensor:
    """z[t, g] = sum over m of x[t, g, m] v[g, m] (paper, equation 1), without a copy of x.

    Args:
        x: (..., D), D <= G * M; features beyond D count as zero.
        v_GM: (G, M); cast to the type of x.
        shared: all whole groups have the same vector, so that sub-tokens are rows of one product.

    Returns:
        (T, G), T the product of all leading dimensions.
    """
    features = x.shape[-1]
    groups, size = v_GM.shape
    x_TD = x.reshape(-1, features)
    v_GM = v_GM.to(x.dtype)
    full = features // size
    if full == groups:
        return _whole_groups(x_TD, v_GM, shared)
    z_TG = x_TD.new_zeros(x_TD.shape[0], groups)
    if full:
        z_TG[:, :full] = _whole_groups(x_TD[:, : full * size], v_GM[:full], shared)
    rest = features - full * size
    if rest:
        z_TG[:, full] = x_TD[:, full * size :] @ v_GM[full, :rest]
    return z_TG


def project_to_save(x: Tensor, v_GM: Tensor, shared: bool, dtype: torch.dtype) -> Tensor:
    """`project`, for nothing but to be saved for the backward pass.

    Gradient checkpointing drops what its first pass saves, and looks at shape and type alone: there
    the numbers are left out, and the second pass computes them.

    Args:
        x: as in `project`.
        v_GM: as in `project`.
        shared: as in `project`.
        dtype: of the result.

    Returns:
        (T, G), without a graph.
    """
    if type(x) in (Tensor, Parameter) and _saving_is_dropped():
        return x.detach().new_empty(x[..., 0].numel(), v_GM.shape[0], dtype=dtype)
    return project(x.detach(), v_GM, shared).to(dtype)


CHUNK = {"cpu": 1 << 18}
"""Entries of x that are multiplied at a time, so that their products stay in cache; on a CPU, where
a batched product of thin matrices takes several times as long in float32."""


def _whole_groups(x_TD: Tensor, v_GM: Tensor, shared: bool) -> Tensor:
    """`project` of D = G * M features."""
    groups, size = v_GM.shape
    x_TGM = x_TD.unflatten(1, (groups, size))
    if shared and x_TD.is_contiguous():  # else flattening would copy x
        return (x_TGM.flatten(0, 1) @ v_GM[0].unsqueeze(1)).view(-1, groups)
    wide = x_TD.dtype in (torch.float32, torch.float64)
    if torch.compiler.is_compiling() or not wide or x_TD.device.type not in CHUNK:
        return torch.einsum("tgm,gm->tg", x_TGM, v_GM)
    rows = max(1, CHUNK[x_TD.device.type] // (groups * size))
    return torch.cat([(part * v_GM).sum(dim=2) for part in x_TGM.split(rows)])


def contract(dW_OD: Tensor, v_GM: Tensor) -> Tensor:
    """C[o, g] = sum over m of dW[o, g, m] v[g, m]: the factor of an exact gradient. (O, G)."""
    return project(dW_OD, v_GM)


def expand(coef_OG: Tensor, e_GM: Tensor, features: int) -> Tensor:
    """delta[o, g, m] = coef[o, g] e[g, m], as (O, D)."""
    return (coef_OG.unsqueeze(-1) * e_GM).flatten(1)[:, :features]


def apply_linear(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    """The plain layer's own arithmetic, so that outputs are bitwise what they were."""
    scattered = x.dim() > 2 and not x.is_contiguous()
    if not (transposed or scattered):
        return F.linear(x, weight, bias)
    shape = (*x.shape[:-1], weight.shape[1 if transposed else 0])
    flat = x.reshape(-1, x.shape[-1])
    if not transposed:
        # What F.linear does for a weight that needs a gradient; for a frozen one it batches.
        y = (flat @ weight.t()).view(shape)
        return y if bias is None else y + bias.to(y.dtype)
    y = flat @ weight if bias is None else torch.addmm(bias, flat, weight)
    return y.view(shape)


class FactoredLinear(Function):
    """``y = x Wᵀ + (x e) coefᵀ + b`` that saves z (T x G) and W, and nothing of the size of x.

    Gradients: dX = dY W + (dY coef) e exactly, d coef = scale * dYᵀ z, db = sum of dY; with
    ``dense``, dW = scale * (dYᵀ z) v instead of d coef (paper, Algorithm 1). ``z`` is computed by
    the caller; ``None`` means that the layer has no vectors yet (evaluation before training), and
    the backward pass warns that the weight gets no gradient.
    """

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        coef: Tensor | None,
        z: Tensor | None,
        v: Tensor | None,
        e: Tensor | None,
        scale: float,
        transposed: bool,
        name: str,
    ) -> Tensor:
        """Compute y. ``v`` is given for a dense gradient, ``e`` while coefficients are pending."""
        y = apply_linear(x, weight, bias, transposed)
        if e is not None:
            assert coef is not None
            pending = F.linear(project(x, e), coef.to(x.dtype))
            y = y + pending.view(y.shape).to(y.dtype)
        # Not a view for autograd, which forbids in-place operators on views made in a Function.
        return torch.ops.aten._unsafe_view(y, y.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save what the backward pass needs: never x."""
        x, weight, _bias, coef, z, v, e, scale, transposed, name = inputs
        ctx.kept = None if torch.compiler.is_compiling() else _kept(x)
        if ctx.kept is None:
            ctx.save_for_backward(z, weight, coef, v, e)
        ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
        ctx.bias_dtype = None if _bias is None else _bias.dtype
        ctx.coef_dtype = None if coef is None else coef.dtype
        ctx.scale, ctx.transposed, ctx.name = scale, transposed, name

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight, bias and coef."""
        (grad_output,) = grad_outputs
        with torch.no_grad():
            grads = _gradients(ctx, grad_output)
        if torch.is_grad_enabled():  # create_graph=True
            _z, weight, coef, _v, _e = _saved(ctx)
            trained = weight if coef is None else coef
            grads = tuple(
                g if g is None else _NoDoubleBackward.apply(g, grad_output, trained) for g in grads
            )
        return (*grads, None, None, None, None, None, None)


class Keep(Function):
    """x itself, from a node that holds what the backward pass of :class:`FactoredLinear` needs.

    Gradient checkpointing stops computing a block again as soon as its last saved tensor is there,
    and what a Function saves is there when it has ended. Saved by a node in front of the product,
    z of a block's last layer spares that layer's product.
    """

    @staticmethod
    def forward(
        x: Tensor,
        z: Tensor | None,
        weight: Tensor,
        coef: Tensor | None,
        v: Tensor | None,
        e: Tensor | None,
    ) -> Tensor:
        """Alias of x: no copy."""
        return x.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save everything but x."""
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of x."""
        return (*grad_outputs, None, None, None, None, None)


def factored_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    coef: Tensor | None,
    z: Tensor | None,
    v: Tensor | None,
    e: Tensor | None,
    scale: float,
    transposed: bool,
    name: str,
) -> Tensor:
    """:class:`FactoredLinear`, behind :class:`Keep` where that spares checkpointing a product."""
    if x.requires_grad and not torch.compiler.is_compiling() and _saving_is_hooked():
        x = Keep.apply(x, z, weight, coef, v, e)
    return FactoredLinear.apply(x, weight, bias, coef, z, v, e, scale, transposed, name)


def _saving_is_hooked() -> bool:
    """Whether someone handles saved tensors, as checkpointing does; not so in ``torch.func``."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks is not None and not torch._C._are_functorch_transforms_active()


_DROPPING = "torch.utils.checkpoint", "_checkpoint_hook"
"""Module and class of the hook that, in the first pass of checkpointing, keeps no tensor."""


def _saving_is_dropped() -> bool:
    """Whether what is saved now is dropped, and computed again before it is needed.

    Not where dispatch modes are active: selective checkpointing counts operators, which have to be
    the same ones in both passes.
    """
    if torch.compiler.is_compiling() or not _saving_is_hooked():
        return False
    pack, _unpack = torch._C._autograd._top_saved_tensors_default_hooks(False)
    found = getattr(pack, "__module__", None), getattr(pack, "__qualname__", "").partition(".")[0]
    return found == _DROPPING and torch._C._len_torch_dispatch_stack() == 0


def _kept(x: Tensor) -> Any:
    """The node of :class:`Keep` that made x, if one did."""
    return x.grad_fn if type(x.grad_fn) is Keep._backward_cls else None


def _saved(ctx: Any) -> Any:
    """z, weight, coef, v and e."""
    return (ctx if ctx.kept is None else ctx.kept).saved_tensors


def _gradients(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    z, weight, coef, v, e = _saved(ctx)
    needs_x, needs_weight, needs_bias, needs_coef = ctx.needs_input_grad[:4]
    outputs = grad_output.shape[-1]
    features = ctx.x_shape[-1]
    dY_TO = grad_output.reshape(-1, outputs)
    dX = dW = db = dC = None
    if needs_x:
        cast = weight.to(dY_TO.dtype)
        dX = dY_TO @ (cast.t() if ctx.transposed else cast)
        if e is not None:
            dX += expand(dY_TO @ coef.to(dY_TO.dtype), e.to(dY_TO.dtype), features)
        dX = dX.view(ctx.x_shape).to(ctx.x_dtype)
    if needs_bias:
        db = dY_TO.sum(0).to(ctx.bias_dtype)
    if z is None:
        if needs_coef or needs_weight:
            warnings.warn(
                f"VeLoRA: layer {ctx.name!r} is in evaluation mode and has no vectors yet, so its "
                f"weight gets no gradient. Call model.train() for the steps that should train it.",
                stacklevel=2,
            )
        return dX, None, db, None
    dense = v is not None
    if needs_coef or (needs_weight and dense):
        factor_OG = dY_TO.t() @ z.to(dY_TO.dtype)
        if dense:
            dW = expand(factor_OG, (v * ctx.scale).to(factor_OG.dtype), features)
            dW = (dW.t() if ctx.transposed else dW).to(weight.dtype)
        else:
            dC = factor_OG.to(ctx.coef_dtype)
            if ctx.scale != 1.0:
                dC = dC * ctx.scale
    return dX, dW, db, dC


class HasVectors(Protocol):
    """A layer, as far as :class:`ExposedWeight` knows it."""

    velora_vectors: Tensor


class ExposedWeight(Function):
    """The weight as code outside the layer's forward sees it: an alias that autograd can follow.

    Whoever uses ``layer.weight`` in a differentiable way (functional attention, a penalty on the
    weights) trains the coefficients through C = dW v, the factor of the exact gradient.
    """

    @staticmethod
    def forward(
        weight: Tensor, coef: Tensor, layer: HasVectors, scale: float, transposed: bool
    ) -> Tensor:
        """Alias of the weight: no copy."""
        return weight.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save nothing: the vectors are read in the backward pass.

        They may be drawn after the weight was read and before its layer's first forward.
        """
        _weight, coef, layer, scale, transposed = inputs
        ctx.layer = layer
        ctx.coef_dtype, ctx.scale, ctx.transposed = coef.dtype, scale, transposed

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """The factor of the exact gradient."""
        v = ctx.layer.velora_vectors
        (dW,) = grad_outputs
        if ctx.transposed:
            dW = dW.t()
        return None, (contract(dW, v) * ctx.scale).to(ctx.coef_dtype), None, None, None


class _NoDoubleBackward(Function):
    """Identity whose own backward is an error: the factor is not differentiable in x.

    The other two inputs tie the error to all that the gradient depends on.
    """

    @staticmethod
    def forward(gradient: Tensor, grad_output: Tensor, trained: Tensor) -> Tensor:
        """Pass through."""
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save nothing."""

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        """Refuse."""
        raise RuntimeError(
            "VeLoRA: double backward through a compressed layer. The input was not kept, so second "
            "derivatives would be wrong. Call velora_torch.restore(model) first, or leave the "
            "layers that need second derivatives out of `targets`."
        )
