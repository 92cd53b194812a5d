"""The operators: for each family its autograd function and the choice of a backend."""
