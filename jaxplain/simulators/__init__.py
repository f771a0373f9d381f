"""Predicting a neuron's activations from its explanation alone."""
