"""Text sources, windows of tokens, and the token table."""
