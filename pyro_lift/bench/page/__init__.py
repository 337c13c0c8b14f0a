"""``pyro-lift report``: the results of ``pyro-lift bench paper`` as one page, each table beside the paper's."""
