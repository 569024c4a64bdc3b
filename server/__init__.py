"""Serve one base model and any mix of adapters from one process."""
