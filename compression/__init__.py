"""Transformations of a trained model, and of its training, that make it smaller."""
