"""Ways to use pyfused in code that calls torch: patch, convert, run; and what they do to a call."""
