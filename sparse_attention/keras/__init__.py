"""Keras: a layer, a language model, an optimizer, decoding."""
