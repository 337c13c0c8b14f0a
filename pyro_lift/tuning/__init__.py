"""Tuning: settings that are chosen on tasks held out of meta-training."""
