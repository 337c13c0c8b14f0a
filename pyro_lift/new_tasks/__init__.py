"""New tasks under a learned prior: the chains of their weights, and the posteriors that come of them."""
