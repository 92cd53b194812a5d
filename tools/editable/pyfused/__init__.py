"""Imports pyfused from the source folder; `make build` adds the folder above to sys.path.

pip's editable install appends a finder to sys.meta_path. In a folder that contains a clone, Python
would import the clone's folder instead, as a namespace package. A package in sys.path comes before
it, and after one in the current directory or in PYTHONPATH.
"""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

spec = spec_from_file_location(__name__, Path(__file__).parents[3] / "pyfused/__init__.py")
assert spec is not None
assert spec.loader is not None
sys.modules[__name__] = module = module_from_spec(spec)  # importing returns this module
spec.loader.exec_module(module)
