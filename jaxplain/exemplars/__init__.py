"""The streaming reductions and the extraction run."""
