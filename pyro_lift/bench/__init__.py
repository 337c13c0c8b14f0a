"""Benchmarks of ``pyro-lift bench NAME``: one file each, all with ``run(...) -> records`` and ``draw(records, path)``.

Whatever compares speeds is measured in one run, interleaved, and reported as a ratio.
"""
