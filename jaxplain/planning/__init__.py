"""What an extraction will cost, said before anything is spent."""
