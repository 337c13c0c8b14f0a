"""What is asked of a finished run, and of a sampler: ArviZ's container, convergence, calibration, predictive checks."""

from pyro_lift.diagnostics.calibration import Calibration, sbc
from pyro_lift.diagnostics.container import SAMPLE_STATS, from_mcmc
from pyro_lift.diagnostics.nuts import NutsComparison, compare_with_nuts
from pyro_lift.diagnostics.predictive_checks import PredictiveCheck, posterior_check, prior_check
from pyro_lift.diagnostics.summary import Coordinate, Summary, summarise

__all__ = [
    "SAMPLE_STATS",
    "Calibration",
    "Coordinate",
    "NutsComparison",
    "PredictiveCheck",
    "Summary",
    "compare_with_nuts",
    "from_mcmc",
    "posterior_check",
    "prior_check",
    "sbc",
    "summarise",
]
