"""Front ends: methods on functions and models that know nothing of them."""

from mora_jax.frontends.adapted import adapted, value_and_grad

__all__ = ["adapted", "value_and_grad"]
