"""Products and adapters on a CPU in compiled code: packed base weights, segments of adapters, attention in place."""

from server.kernels.native.library import Library, find_library
from server.kernels.native.weights import FloatWeight, Int8Weight, NF4Weight, PackedWeight, nf4_parts

__all__ = ["FloatWeight", "Int8Weight", "Library", "NF4Weight", "PackedWeight", "find_library", "nf4_parts"]
