"""Mixture of experts: a channel mixer of which each token uses a few parts, chosen by a router."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from phyla.kernels.partition import AXES
from phyla.models.config import Activation, LayerConfig, ModelConfig
from phyla.models.errors import UserError
from phyla.models.layers import ACTIVATIONS, ExpertLinear, Layer, Linear
from phyla.models.mlp import GatedMLPConfig, MLPConfig
from phyla.models.weights import fan_in, normal


@dataclass(frozen=True, kw_only=True)
class MoEConfig(LayerConfig):
    """Σ over a token's experts of weight · down(activation(gate(x)) · up(x)); no token is dropped."""

    experts: int = 8
    """E, how many there are."""
    top_k: int = 2
    """k, how many a token uses."""
    expand: float = 8 / 3
    """An expert's hidden width over the model's width."""
    activation: Activation = "silu"
    """Of the gate (of the hidden layer, without gates)."""
    gated: bool = True
    """Experts are gated; else down(activation(up(x)))."""
    weights: Literal["softmax_of_chosen", "softmax_of_all"] = "softmax_of_chosen"
    """Of a token's experts: a softmax over their k router logits, which sum to 1 (Mixtral); or their entries of the
    softmax over all E, which do not (Jamba, Switch)."""
    shared: int = 0
    """Experts that every token uses besides, with weight 1 (DeepSeekMoE)."""
    balance_loss: float = 0.01
    """Coefficient of the load balancing loss in training (Fedus et al. 2022, equation 4)."""
    z_loss: float = 0.001
    """Coefficient of the router's z-loss in training (Zoph et al. 2022, equation 5)."""

    def build(self, model: ModelConfig, rngs: nnx.Rngs, layer: jax.Array | int) -> "MoE":
        """See `LayerConfig.build`."""
        if self.experts < 1:
            raise UserError(f"moe.experts must be at least 1, not {self.experts}")
        if not 1 <= self.top_k <= self.experts:
            nearest = min(max(self.top_k, 1), self.experts)
            raise UserError(
                f"moe.top_k must be at least 1 and at most moe.experts {self.experts}, not {self.top_k}; "
                f"nearest: {nearest}"
            )
        if self.hidden(model) < 1:
            raise UserError(f"moe.expand must give at least one hidden channel, not {self.expand}")
        for name in ("shared", "balance_loss", "z_loss"):
            if not getattr(self, name) >= 0:
                raise UserError(f"moe.{name} must be at least 0, not {getattr(self, name)}")
        return MoE(self, model, rngs, layer)

    def hidden(self, model: ModelConfig) -> int:
        """The hidden width of an expert."""
        return round(self.expand * model.width)


class Routing(NamedTuple):
    """How one call used a mixture's experts: float32 sums over its tokens, padding left out."""

    load: jax.Array  # [E], tokens that use each expert
    probability: jax.Array  # [E], of the softmax over all experts
    z: jax.Array  # [], of logsumexp(router logits)²
    tokens: jax.Array  # []


class MoE(Layer):
    """See `MoEConfig`. The router works in float32."""

    routes: ClassVar[bool] = True

    def __init__(self, config: MoEConfig, model: ModelConfig, rngs: nnx.Rngs, layer: jax.Array | int):
        self.config = config
        E, d, hidden = config.experts, model.width, config.hidden(model)
        experts = functools.partial(ExpertLinear, E, rngs=rngs, share=config.top_k / E)
        self.router = Linear((d, E), ("embed", "experts"), rngs, init=normal(0.02), precise="it chooses the experts")
        self.up = experts((d, hidden), ("embed", "mlp"))
        self.down = experts((hidden, d), ("mlp", "embed"), init=fan_in(1 / math.sqrt(2 * model.layers)))
        self.gate = experts((d, hidden), ("embed", "mlp")) if config.gated else None
        if config.shared:
            kind = GatedMLPConfig if config.gated else MLPConfig
            expand = config.shared * hidden / d
            self.shared = kind(expand=expand, activation=config.activation).build(model, rngs, layer)

    def __call__(
        self, x: jax.Array, state: None = None, segment_ids: jax.Array | None = None
    ) -> tuple[jax.Array, None, Routing]:
        """[B, T, D] -> [B, T, D]; stateless. Padding (segment 0) uses no expert but the shared ones."""
        real_BxT = jnp.ones(x.shape[:2], bool) if segment_ids is None else segment_ids != 0
        weight_BxTxK, expert_BxTxK, routing = self._route(x, real_BxT)
        y = _on_each_device(self._use, x, weight_BxTxK, expert_BxTxK, self._experts())
        if self.config.shared:
            y += self.shared(x)[0]
        return y, None, routing

    def _route(self, x: jax.Array, real_BxT: jax.Array) -> tuple[jax.Array, jax.Array, Routing]:
        """Weights and numbers of each token's experts, [B, T, k]; a padding token's experts have the number E."""
        E, k = self.config.experts, self.config.top_k
        logits_BxTxE = self.router(x.astype(jnp.float32))
        probability_BxTxE = jax.nn.softmax(logits_BxTxE)
        chosen_BxTxK, expert_BxTxK = jax.lax.top_k(logits_BxTxE, k)
        if self.config.weights == "softmax_of_chosen":
            weight_BxTxK = jax.nn.softmax(chosen_BxTxK)
        else:
            weight_BxTxK = jnp.take_along_axis(probability_BxTxE, expert_BxTxK, axis=-1)
        expert_BxTxK = jnp.where(real_BxT[..., None], expert_BxTxK, E)
        real = real_BxT.astype(jnp.float32)
        routing = Routing(
            load=jnp.sum(expert_BxTxK[..., None] == jnp.arange(E), axis=(0, 1, 2), dtype=jnp.float32),
            probability=jnp.einsum("bte,bt->e", probability_BxTxE, real),
            z=jnp.sum(jnp.square(jax.nn.logsumexp(logits_BxTxE, axis=-1)) * real),
            tokens=jnp.sum(real),
        )
        return weight_BxTxK, expert_BxTxK, routing

    def _experts(self) -> dict[str, ExpertLinear]:
        experts = {"up": self.up, "down": self.down}
        return experts if self.gate is None else experts | {"gate": self.gate}

    def _use(
        self, x_BxTxD: jax.Array, weight_BxTxK: jax.Array, expert_BxTxK: jax.Array, experts: dict[str, ExpertLinear]
    ) -> jax.Array:
        """Σ over each token's experts of weight · expert(x)."""
        E, N = self.config.experts, expert_BxTxK.size
        copies_BxTxKxD = jnp.broadcast_to(x_BxTxD[:, :, None], (*expert_BxTxK.shape, x_BxTxD.shape[-1]))
        x_NxD, expert_N = copies_BxTxKxD.reshape(N, -1), expert_BxTxK.reshape(N)
        if N <= E:  # a few tokens: decoding
            real_BxTxK = expert_BxTxK < E
            weight_BxTxK = jnp.where(real_BxTxK, weight_BxTxK, 0)
            chosen_N = jnp.minimum(expert_N, E - 1)
            y_NxD = self._expert(x_NxD, experts, lambda linear, x: linear.chosen(x, chosen_N))
        else:
            # Sorted by expert, through the experts, and back. Padding comes last, beyond all groups, and gives zeros.
            order_N = jnp.argsort(expert_N)
            inverse_N = jnp.argsort(order_N)
            sizes_E = jnp.sum(expert_N[:, None] == jnp.arange(E), axis=0, dtype=jnp.int32)
            x_NxD = _permute(x_NxD, order_N, inverse_N)
            y_NxD = self._expert(x_NxD, experts, lambda linear, x: linear(x, sizes_E))
            y_NxD = _permute(y_NxD, inverse_N, order_N)
        y_BxTxKxD = y_NxD.reshape(copies_BxTxKxD.shape).astype(jnp.float32)
        return jnp.sum(y_BxTxKxD * weight_BxTxK[..., None], axis=2).astype(x_BxTxD.dtype)

    def _expert(
        self,
        x_NxD: jax.Array,
        experts: dict[str, ExpertLinear],
        multiply: Callable[[ExpertLinear, jax.Array], jax.Array],
    ) -> jax.Array:
        activation = ACTIVATIONS[self.config.activation]
        hidden_NxH = activation(multiply(experts["gate" if self.config.gated else "up"], x_NxD))
        if self.config.gated:
            hidden_NxH *= multiply(experts["up"], x_NxD)
        return multiply(experts["down"], hidden_NxH)


@jax.custom_vjp
def _permute(x: jax.Array, order: jax.Array, inverse: jax.Array) -> jax.Array:
    """x[order]; the gradient gathers too, where autodiff would scatter."""
    return x.at[order].get(mode="promise_in_bounds", unique_indices=True)


def _permute_forward(x, order, inverse):
    return _permute(x, order, inverse), (order, inverse)


def _permute_backward(saved, g):
    order, inverse = saved
    return _permute(g, inverse, order), None, None


_permute.defvjp(_permute_forward, _permute_backward)


def _on_each_device(
    use: Callable[..., jax.Array], x: jax.Array, weight: jax.Array, expert: jax.Array, experts: dict[str, ExpertLinear]
) -> jax.Array:
    """`use(x, weight, expert, experts)`, each device with its own rows of the batch.

    Sorting is over the rows that one call sees. Without this, devices that share a batch would sort all of it, and
    each would do the work of all. It needs the mesh as the context (`jax.set_mesh`); without one, it is a plain call.
    """
    mesh = jax.sharding.get_abstract_mesh()
    free = [axis for axis in AXES["B"] if axis in mesh.axis_names and axis not in mesh.manual_axes]
    axes = tuple(axis for axis in free if mesh.shape[axis] > 1)
    if not axes or len(x) % math.prod(mesh.shape[axis] for axis in axes):
        return use(x, weight, expert, experts)
    rows, whole = PartitionSpec(axes), PartitionSpec()
    specs = {"in_specs": (rows, rows, rows, whole), "out_specs": rows}
    # Unchecked: JAX's own exact GELU does not type-check here (its constants vary over no axis).
    local = jax.shard_map(use, axis_names=set(axes), check_vma=False, **specs)
    return local(x, weight, expert, experts)


def auxiliary_losses(model: ModelConfig, routing: tuple[Routing, ...]) -> tuple[jax.Array, dict[str, jax.Array]]:
    """What a mixture of experts adds to the training loss, and what to watch of its routing.

    The balance loss of a layer is E Σ_e f_e P_e, where f_e is the share of the choices that fell on expert e and P_e
    its mean router probability: 1 where all are used alike (Fedus et al. 2022, Switch Transformers, section 2.2; for
    k choices f is divided by k). The z-loss of a layer is the mean of logsumexp(router logits)² (Zoph et al. 2022,
    ST-MoE, section 3.2). Means are over the tokens that one call saw: a microbatch, on all devices.

    Args:
        model: whose routing it is.
        routing: `Output.routing` of its `forward`.

    Returns:
        The sum over layers of both losses, each times its coefficient, [] float32; and the means over layers of
        `balance_loss` and `z_loss`, and the share of the choices that fell on the `busiest_expert` and the
        `idlest_expert` of any layer (1 / E is balanced). 0 and nothing for a model without experts.
    """
    if not routing:
        return jnp.zeros(()), {}
    channels = [block.channel for block in (*model.prefix, *model.pattern)]
    mixtures = [channel for channel in channels if isinstance(channel, MoEConfig)]
    total, balances, zs, shares = jnp.zeros(()), [], [], []
    for config, sums in zip(mixtures, routing, strict=True):
        tokens_L = jnp.maximum(sums.tokens, 1)  # every leaf is stacked over L layers
        share_LxE = sums.load / (config.top_k * tokens_L[:, None])
        balance_L = config.experts * jnp.sum(share_LxE * sums.probability / tokens_L[:, None], axis=-1)
        z_L = sums.z / tokens_L
        total += config.balance_loss * jnp.sum(balance_L) + config.z_loss * jnp.sum(z_L)
        balances.append(balance_L)
        zs.append(z_L)
        shares.append(share_LxE)
    return total, {
        "balance_loss": jnp.mean(jnp.concatenate(balances)),
        "z_loss": jnp.mean(jnp.concatenate(zs)),
        "busiest_expert": jnp.max(jnp.stack([jnp.max(share) for share in shares])),
        "idlest_expert": jnp.min(jnp.stack([jnp.min(share) for share in shares])),
    }
