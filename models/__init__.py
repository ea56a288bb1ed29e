"""Flax NNX modules: layers, mixers, channel mixers, blocks and the language model, with their configurations."""
