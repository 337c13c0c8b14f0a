"""pyro_lift: learning to fine-tune by Bayesian meta-learning of LoRA adapters, on Pyro."""

__version__ = "0.1.0"
