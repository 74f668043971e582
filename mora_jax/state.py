"""`State`: parameters, adapters and methods together, so that compiled steps never meet the wrong methods."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jaxtyping import Array, Int, PRNGKeyArray

from mora_jax import moments, transform, trees
from mora_jax.errors import InputError
from mora_jax.orienting import orient
from mora_jax.transform import Group, Methods, Params, Rules, Tree


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["params", "adapters", "step"], meta_fields=["methods"]
)
@dataclasses.dataclass(frozen=True)
class State:
    """A model's parameters with their adapters, as an argument of a compiled step.

    The methods are part of the pytree's structure. So a step that is compiled by `jax.jit` with a State as
    its argument is compiled again when a restart changes a method, and never runs with the old one. For the
    same reason a checkpoint does not hold a State: save its arrays, and `methods.to_json()` beside them, or
    use `mora_jax.save`.

    Attributes:
      params: the model's parameters, any pytree.
      adapters: the adapters' arrays.
      methods: what is done with each parameter.
      step: updates done.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from mora_jax import MoRA, State, value_and_grad
      >>> def loss(params, x):
      ...     return jnp.mean((x @ params["w"] - 1) ** 2)
      >>> state = State.init(jax.random.key(0), {"w": jnp.zeros((8, 8))}, [("w", MoRA(2))])
      >>> optimizer = state.optimizer(optax.adam(1e-2))
      >>> opt_state = optimizer.init(state.trainable)
      >>> @jax.jit
      ... def step(state, opt_state, x):
      ...     value, gradients = value_and_grad(loss)(state, x)
      ...     updates, opt_state = optimizer.update(gradients, opt_state, state.trainable)
      ...     return state.updated(updates), opt_state, value
      >>> for i in range(20):
      ...     if i == 10:
      ...         state, opt_state = state.restart(jax.random.key(i), opt_state, optimizer)
      ...     state, opt_state, value = step(state, opt_state, jnp.ones((4, 8)))
      >>> float(value) < 0.1, state.methods["w"].pattern
      (True, '1')
    """

    params: Params
    adapters: Tree
    methods: Methods
    step: Int[Array, ""]

    @staticmethod
    def init(key: PRNGKeyArray, params: Params, rules: Rules, stacked: str = "") -> "State":
        """Returns the state before the first update. `rules` and `stacked` are those of `assign`.

        Raises:
          InputError: as `assign` does.
        """
        methods = transform.assign(rules, params, stacked)
        return State(params, transform.attach(key, params, methods), methods, jnp.zeros((), jnp.int32))

    @property
    def trainable(self) -> Params:
        """What is trained, {"params": ..., "adapters": ...}: what an optimizer's functions take."""
        return transform.partition(self.params, self.adapters, self.methods)[0]

    def with_trainable(self, trainable: Params) -> "State":
        """Returns the state with other trained arrays; the frozen ones stay."""
        _, frozen = transform.partition(self.params, self.adapters, self.methods)
        arrays = trees.combine(trainable, frozen)
        return dataclasses.replace(self, params=arrays["params"], adapters=arrays.get("adapters", {}))

    def updated(self, updates: Params) -> "State":
        """Returns the state after one update, as an optimizer's `update` returns it."""
        state = self.with_trainable(optax.apply_updates(self.trainable, updates))
        return dataclasses.replace(state, step=self.step + 1)

    def merged(self) -> Params:
        """Returns the parameters with every adapter merged, for the plain model."""
        return transform.merge(self.params, self.adapters, self.methods)

    def oriented(self, gradients: Params, key: PRNGKeyArray | None = None) -> "State":
        """Returns the state with adapters fitted to gradients, before they are trained or after a restart.

        Only methods such as `Spectral` do so; the arrays of others stay.

        Args:
          gradients: the gradient of the loss for `merged()`, or that of the adapted kernels as a nested dict.
          key: random key of what methods draw, such as sampled bases.

        Raises:
          InputError: if an adapter holds an update, which would be lost; inside jit that is not seen. Or if a
            gradient is missing or has another shape than its kernel, or a method needs a key.
        """
        kernels = trees.flatten(self.params)
        for path, on, arrays in transform.adapters_of(self.params, self.adapters, self.methods):
            if on.method.orients:
                merged = transform.effective(on, arrays, kernels[path])
                if not isinstance(merged, Tracer) and not jnp.array_equal(kernels[path], merged):
                    raise InputError(f"{path} has an update, which would be lost; restart first")
        adapters = orient(self.adapters, self.methods, gradients, key)
        return dataclasses.replace(self, adapters=adapters)

    def optimizer(
        self, tx: optax.GradientTransformation | Callable[[Group], optax.GradientTransformation]
    ) -> optax.GradientTransformation:
        """Returns an optimizer of the trainable arrays, valid before and after restarts.

        Each group has a state of its own; frozen parameters have none. Updates are scaled by the groups'
        multiples of the learning rate, such as LoRA+'s. What must see all gradients at once, such as clipping
        by their norm, is chained before: `optax.chain(optax.clip_by_global_norm(1.0), state.optimizer(tx))`.

        Args:
          tx: a transformation for all groups, or a function that returns one for a `Group`: its `adapter` and
            `weight_decay` say what may be treated differently.
        """
        labels = transform.labels(self.params, self.adapters, self.methods)
        by_label = {group.label: scaled(tx, group) for group in jax.tree.leaves(labels)}
        return optax.partition(by_label, jax.tree.map(lambda group: group.label, labels))

    def restart(
        self,
        key: PRNGKeyArray,
        opt_state: Any,
        optimizer: optax.GradientTransformation,
        how: moments.Clear = "reset",
        share: float = 0.9,
    ) -> tuple["State", Any]:
        """Merges the adapters, initialises new ones, switches the methods and clears the adapters' state.

        The model's outputs do not change. Learning rate schedules continue.

        Args:
          key: random key of the new adapters and of pruning.
          opt_state: state of `optimizer`.
          optimizer: what `State.optimizer` returned, or a chain with it.
          how: "reset" starts the adapters' optimizer state anew; "magnitude" and "random" zero a share of
            Adam's moments; "mean" zeroes the first moments and averages the second ones over each kernel.
          share: share to prune, in [0, 1].

        Returns:
          The new state, and the new state of the optimizer.

        Raises:
          InputError: if a method has no update to merge and continue from, as DoRA.
        """
        self.methods.check_restart()
        adapter_key, pruning_key = jax.random.split(key)
        parts = transform.restart(adapter_key, self.params, self.adapters, self.methods)
        state = State(*parts, self.step)
        groups = jax.tree.leaves(transform.labels(self.params, self.adapters, self.methods))
        labels = frozenset(group.label for group in groups if group.adapter)
        fresh = optimizer.init(state.trainable)
        return state, moments.clear(opt_state, fresh, labels, how, share, pruning_key)


def scaled(tx: Any, group: Group) -> optax.GradientTransformation:
    """Returns a transformation, or what a function of the group returns, scaled by the group's multiple."""
    tx = tx if hasattr(tx, "update") else tx(group)
    return tx if group.lr_scale == 1 else optax.chain(tx, optax.scale(group.lr_scale))
