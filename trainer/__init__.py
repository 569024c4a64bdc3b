"""Train an adapter, measure it against the base, publish it when it is better.

Uses the core (recipes, base, store). Does not know the server. Import the submodules: most of them load torch.
"""

from __future__ import annotations

__all__: list[str] = []
