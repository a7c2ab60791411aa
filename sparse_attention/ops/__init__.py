"""The fused op in TensorFlow."""
