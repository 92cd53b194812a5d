"""The operators: their declarations, a file for each family, and torch's definitions of them."""
