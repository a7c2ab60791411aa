"""What is computed: layouts, masks and the plans made of them. NumPy only."""
