"""Scores: of probabilities, of texts, of a task, and tests of their differences."""

from pyro_lift.metrics.probabilities import Reliability, accuracy, expected_calibration_error, nll, reliability
from pyro_lift.metrics.significance import PairedTest, paired_test

__all__ = [
    "PairedTest",
    "Reliability",
    "accuracy",
    "expected_calibration_error",
    "nll",
    "paired_test",
    "reliability",
]
