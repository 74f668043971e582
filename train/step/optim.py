"""Learning-rate schedules, AdamW and Muon by parameter group, and what a restart does to their state."""

import dataclasses
import functools
from collections.abc import Mapping, Set
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray

from mora_jax import moments, sharding, trees
from mora_jax.errors import InputError
from mora_jax.models.llama import EMBEDDINGS
from mora_jax.transform import Methods
from train.config.sections import GroupRule, Optimizer, Restart
from train.step.spec import StepSpec

MUON_STEPS = 5  # of the Newton-Schulz iteration
UNDECAYED = ("scale", "bias")  # names of the parameters of norms and of biases


def learning_rate(spec: StepSpec, step: Int[Array, ""]) -> Float[Array, ""]:
    """Returns the rate of update `step` (from 0), computed in float32.

    "jagged-cosine" follows one cosine over the run. After a restart the rate climbs from 0 to where the
    cosine will be when the restart's warm-up ends (ReLoRA, arXiv:2307.05695, section 3).
    """
    warmup, total = spec.schedule.warmup, spec.steps
    step = jnp.asarray(step, jnp.float32)
    ratio = jnp.where(
        step < warmup, step / max(warmup, 1), _decay(spec, (step - warmup) / max(total - warmup, 1))
    )
    if spec.schedule.kind == "jagged-cosine":
        every, again = spec.restart.every, spec.restart.warmup
        since = _since_restart(spec, step)
        end = _decay(spec, (step - since + again - warmup) / max(total - warmup, 1))
        ratio = jnp.where((since < again) & (step >= every), since / max(again, 1) * end, ratio)
    return spec.optimizer.learning_rate * ratio


def _since_restart(spec: StepSpec, step: Array) -> Array:
    """Returns the updates between the last restart, or the run's start, and `step`."""
    if spec.restart.growth == 1:
        return step % spec.restart.every
    starts = jnp.asarray((0, *spec.restart.starts(spec.steps)), jnp.float32)
    return step - starts[jnp.searchsorted(starts, step, side="right") - 1]


def _decay(spec: StepSpec, progress: Array) -> Array:
    progress = jnp.clip(progress, 0.0, 1.0)
    left = 1 - progress if spec.schedule.kind == "linear" else 0.5 * (1 + jnp.cos(jnp.pi * progress))
    return spec.schedule.min_ratio + (1 - spec.schedule.min_ratio) * left


@dataclasses.dataclass(frozen=True)
class ArrayOptions:
    """What the optimizer does with one trainable array.

    Attributes:
      adapter: whether the array belongs to an adapter.
      lr_scale: multiple of the learning rate.
      weight_decay: decoupled decay per unit of learning rate.
      muon: whether Muon updates the array, AdamW otherwise.
    """

    adapter: bool
    lr_scale: float
    weight_decay: float
    muon: bool = False

    @property
    def label(self) -> str:
        """Name of the array's optimizer state in checkpoints, such as "base" or "adapter*16.0, muon"."""
        scale = "" if self.lr_scale == 1 else f"*{self.lr_scale}"
        return f"{'adapter' if self.adapter else 'base'}{scale}{', muon' if self.muon else ''}"


def array_options(config: Optimizer, methods: Methods) -> dict[str, ArrayOptions]:
    """Returns the options of every trainable array, by its path under `params/` or `adapters/`.

    A method states a multiple of the rate and whether its arrays are decayed; scales of norms and biases are
    not decayed. The matrices of `config.matrices` are those that methods name, and all trained kernels but
    the head. The first of `config.groups` whose regex matches the rest of the path changes these, and
    `config.embedding_lr_scale` multiplies the rate of the embedding and the head.

    Raises:
      InputError: if a group's rule decides nothing, or neither embedding nor head is trained and their
        multiple is not 1.
    """
    groups = methods.trainable()
    rules = [*config.groups, (trees.CATCH_ALL, GroupRule())]
    try:
        chosen = trees.first_match(rules, {path.partition("/")[2]: None for path in groups})
    except InputError as error:
        raise InputError(f"optimizer.groups: {error}") from error
    embeddings = {f"params/{path}" for path in EMBEDDINGS}
    if config.embedding_lr_scale != 1 and not embeddings & groups.keys():
        raise InputError(
            "optimizer.embedding_lr_scale: neither the embedding nor the head is trained; leave it 1"
        )
    matrices = {
        f"adapters/{path}/{name}"
        for path, method in methods.adapted()
        for name, leaf in method.leaves().items()
        if leaf.matrix
    }
    matrices |= {path for path in groups if path.endswith("/kernel")} - embeddings
    options = {}
    for path, group in groups.items():
        rule = chosen[path.partition("/")[2]]
        scale = group.lr_scale * rule.lr_scale
        decayed = group.weight_decay and path.rpartition("/")[2] not in UNDECAYED
        decay = config.weight_decay if decayed else 0.0
        options[path] = ArrayOptions(
            group.adapter,
            scale * config.embedding_lr_scale if path in embeddings else scale,
            decay if rule.weight_decay is None else rule.weight_decay,
            muon=config.matrices == "muon" and path in matrices,
        )
    return options


def adapter_labels(options: Mapping[str, ArrayOptions]) -> frozenset[str]:
    """Returns the labels of the optimizer state that belongs to adapters."""
    return frozenset(o.label for o in options.values() if o.adapter)


def optimizer(
    config: Optimizer,
    options: Mapping[str, ArrayOptions],
    layouts: sharding.Rules = (),
    products: DTypeLike = jnp.float32,
) -> optax.GradientTransformation:
    """Returns AdamW and Muon without their learning rate, with one state for each label of `array_options`.

    The rate follows the train step and not a count kept here, so that resetting a group's state keeps it.

    Args:
      config: rates, decay and momentum.
      options: of `array_options`.
      layouts: how a mesh may divide the arrays. Arrays on one device need none.
      products: type of the factors of Muon's products.
    """
    labels = trees.unflatten({path: o.label for path, o in options.items()})
    by_label = {o.label: o for o in options.values()}
    decays = {path: o.weight_decay for path, o in options.items()}

    def group(label: str) -> optax.GradientTransformation:
        of_group = {decays[path] for path, o in options.items() if o.label == label}
        parts = [_decayed(decay, decays) for decay in sorted(of_group) if decay]
        adam = optax.scale_by_adam(config.b1, config.b2, config.eps)
        first = muon(config.momentum, layouts, products) if by_label[label].muon else adam
        return optax.chain(first, *parts, optax.scale(by_label[label].lr_scale))

    return optax.partition({label: group(label) for label in sorted(by_label)}, labels)


def muon(
    momentum: float, layouts: sharding.Rules = (), products: DTypeLike = jnp.float32
) -> optax.GradientTransformation:
    """Returns Muon (arXiv:2502.16982) without its learning rate and decay, for matrices (..., k, d).

    Its state is the momentum alone, zero at the start, so that a restart clears it as Adam's moments.
    `optax.contrib.scale_by_muon` keeps coefficients beside it. The devices of a mesh share the matrices that
    `layouts` divides. `products` is the type of the factors of products.
    """

    def orthogonal(updates: Any, _: Any) -> Any:
        function = functools.partial(_orthogonal, products=products)
        return trees.replaced(updates, sharding.by_matrix(function, trees.flatten(updates), layouts))

    return optax.chain(optax.trace(momentum, nesterov=True), optax.stateless(orthogonal))


def _orthogonal(g: Float[Array, "*L K D"], products: DTypeLike) -> Float[Array, "*L K D"]:
    """Returns about the nearest orthogonal matrices, with entries of about 0.2 (root mean square), as Adam's.

    Five steps of a Newton-Schulz iteration bring singular values near 1 (kellerjordan.github.io/posts/muon).
    Padding of stored arrays stays zero, and does not count as a side.
    """

    def times(a: Array, b: Array) -> Array:
        y = jnp.matmul(a.astype(products), b.astype(products), preferred_element_type=jnp.float32)
        return y.astype(g.dtype)

    k, d = g.shape[-2:]
    x = g.mT if k > d else g
    tiny = jnp.finfo(x.dtype).tiny
    x /= jnp.maximum(jnp.abs(x).max((-2, -1), keepdims=True), tiny)  # the norm's squares would underflow
    rows, columns = ((x != 0).any(axis, keepdims=True).sum((-2, -1), keepdims=True) for axis in (-1, -2))
    x /= jnp.maximum(jnp.linalg.norm(x, axis=(-2, -1), keepdims=True), tiny)
    for _ in range(MUON_STEPS):
        gram = times(x, x.mT)
        x = 3.4445 * x + times(2.0315 * times(gram, gram) - 4.775 * gram, x)
    x *= 0.2 * jnp.sqrt(jnp.maximum(rows, columns))
    return x.mT if k > d else x


def _decayed(decay: float, decays: dict[str, float]) -> optax.GradientTransformation:
    """Returns weight decay of the arrays whose decay is this one."""

    def mask(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: decays[jax.tree_util.keystr(path, simple=True, separator="/")] == decay, params
        )

    return optax.add_decayed_weights(decay, mask=mask)


def clear_adapters(
    opt_state: Any, how: Restart, key: PRNGKeyArray, labels: Set[str]
) -> tuple[Any, Float[Array, ""]]:
    """Clears the adapters' optimizer state, or a share of it, as `mora_jax.moments.clear` does.

    Args:
      opt_state: state of `optimizer`.
      how: what to clear.
      key: random key of pruning.
      labels: `adapter_labels`.

    Returns:
      The new state, and the share of the moments' non-zero entries that was cleared.
    """
    fresh = jax.tree.map(jnp.zeros_like, opt_state)  # what both start with
    after = moments.clear(opt_state, fresh, labels, how.optimizer, how.prune, key)
    counts = [
        _non_zero({label: state for label, state in s.inner_states.items() if label in labels})
        for s in (opt_state, after)
    ]
    return after, 1 - counts[1] / jnp.maximum(counts[0], 1)


def _has_moments(node: Any) -> bool:
    return isinstance(node, optax.ScaleByAdamState | optax.TraceState)


def _non_zero(state: Any) -> Array:
    """Returns the number of non-zero entries of all moments."""
    found = [s for s in jax.tree.leaves(state, is_leaf=_has_moments) if _has_moments(s)]
    arrays = [s.trace if isinstance(s, optax.TraceState) else (s.mu, s.nu) for s in found]
    counts = [jnp.count_nonzero(leaf).astype(jnp.float32) for leaf in jax.tree.leaves(arrays)]
    return jnp.sum(jnp.stack(counts))
