"""What is done to a program: samplers, kernels, the online mixture, adaptation, prediction."""
