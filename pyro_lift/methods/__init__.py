"""Methods of the paper's tables: LiFT and Fixed theta, and the registry of all rows."""
