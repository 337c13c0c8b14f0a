"""Checkpoints of a chain: a session, its folder, random streams and running summaries."""
