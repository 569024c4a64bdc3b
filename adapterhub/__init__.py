"""AdapterHub core: settings, errors, assets, base identity, recipes, the adapter store and the command line.

Knows files, names and digests. Does not know tensors: torch is imported inside functions that need it, never here.
"""

__version__ = "0.1.0"

__all__ = ["__version__"]
