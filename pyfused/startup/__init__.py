"""The folder that ``python -m pyfused run`` puts on ``PYTHONPATH``."""
