"""The compiled libraries and kernels: found, built and loaded."""
