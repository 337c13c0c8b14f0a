"""Every table and figure of the paper by a command: which runs it is made of, and how a run is done.

A *table* (:mod:`~pyro_lift.bench.paper.tables`) names contestants and columns. A *cell* of the sweep
(:mod:`~pyro_lift.bench.paper.cells`) trains one method on one split with one seed, and serves every table that shows
it. :mod:`~pyro_lift.bench.paper.families` has the tasks, networks and sizes, at the paper's scale and at a small one.
"""
