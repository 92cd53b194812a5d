"""Elementwise formulas: traced from torch code, differentiated, and compiled to small programs."""
