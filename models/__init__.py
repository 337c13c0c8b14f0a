"""The random part: Pyro programs, priors, likelihoods, and adapters as random nn modules."""
