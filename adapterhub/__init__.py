"""AdapterHub core: settings, errors, assets, base identity, recipes, the adapter store and the command line.

Knows files, names and digests. Does not know tensors: torch is imported inside functions that need it, never here.
"""

import os

__version__ = "0.1.0"

__all__ = ["__version__"]

# The libraries below us report their use to their makers unless told otherwise before they are imported.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
