"""The pretraining program on top of `mora_jax`."""
