"""Scores: of probabilities, of texts, of a task, and tests of their differences."""
