"""Does meta-learning pay here? One comparison of what a user could do with their tasks, in a given time."""
