"""Folders of priors, posteriors and LoRA libraries: tensors, model cards, PEFT adapters, a digest of the base."""
