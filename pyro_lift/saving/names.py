"""Names of the files in a folder of ours; those of PEFT's adapters are in :mod:`~pyro_lift.saving.peft_folder`."""

from __future__ import annotations

__all__ = ["CARD", "CHOICE", "CONFIG", "HEAD", "POSTERIOR", "PRIOR", "RUN"]

#: Describes what a folder is; transformers' models have a file of that name too.
CONFIG = "config.json"
#: What the hub shows of it.
CARD = "README.md"
#: Tensors of a prior, of a posterior, and of a task's own head beside a PEFT adapter.
PRIOR, POSTERIOR, HEAD = "prior.safetensors", "posterior.safetensors", "head.safetensors"
#: What a run of the command line was told, and the settings that ``tune`` chose.
RUN, CHOICE = "run.toml", "choice.json"
