"""Traces elementwise formulas in torch code, differentiates them and compiles them to programs."""
