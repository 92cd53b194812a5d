"""Uses pyfused in code that calls torch: patch, convert, run and explain."""
