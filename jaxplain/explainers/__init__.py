"""From exemplars to sentences: prompts, the models that answer them, and what becomes of the answers."""
