"""The engine: what runs, when, in which slot and block. Only runner, loader and sampling know tensors."""
