"""How well simulated activations agree with real ones."""
