"""Baselines: one algorithm a file, one protocol. :mod:`pyro_lift.methods.registry` has them all by name."""
