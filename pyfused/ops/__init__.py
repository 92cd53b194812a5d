"""The operators: declarations, the choice of a backend, and for each family its plans."""
