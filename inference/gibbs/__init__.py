"""SGLD-Gibbs: the kernel, its plan, a visit, the warm-up, and what they are made of."""
