"""Gradient x activation attribution of every neuron of a model, from one forward and one backward."""
