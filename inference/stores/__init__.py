"""Stores of the tasks' weights: on the device, on the host, on disk."""
