"""Names of the files in a folder of ours; those of PEFT's adapters are in :mod:`~pyro_lift.saving.peft_folder`."""

from __future__ import annotations

__all__ = ["CARD", "CONFIG", "HEAD", "POSTERIOR", "PRIOR"]

#: Describes what a folder is; transformers' models have a file of that name too.
CONFIG = "config.json"
#: What the hub shows of it.
CARD = "README.md"
#: Tensors of a prior, of a posterior, and of a task's own head beside a PEFT adapter.
PRIOR, POSTERIOR, HEAD = "prior.safetensors", "posterior.safetensors", "head.safetensors"
