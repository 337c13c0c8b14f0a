"""What is asked of a finished run: ArviZ's container, and a table of convergence diagnostics."""

from pyro_lift.diagnostics.container import SAMPLE_STATS, from_mcmc
from pyro_lift.diagnostics.summary import Coordinate, Summary, summarise

__all__ = ["SAMPLE_STATS", "Coordinate", "Summary", "from_mcmc", "summarise"]
