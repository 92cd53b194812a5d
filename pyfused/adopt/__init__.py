"""Uses pyfused in code that calls torch: patch, convert, run, explain and tune."""
