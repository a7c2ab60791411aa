"""CUDA on this machine: its GPUs, NVRTC, and the kernels that NVRTC compiles for them."""
