"""What is random: Pyro programs, priors, likelihoods, and adapters as random nn modules."""
