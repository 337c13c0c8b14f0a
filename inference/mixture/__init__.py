"""Gaussian mixtures over phi: online EM in its plain, in-place and compiled forms, and batch EM."""
