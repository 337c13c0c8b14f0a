"""Adaptation to a new task: the program of meta-testing, the inner loop, update rules, predictions."""
