"""Forms of other tools that stores are written in, or made from."""
