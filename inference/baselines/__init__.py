"""The methods LiFT is compared with, one algorithm a file."""
