"""Shipped tasks: one folder each, with a recipe and a README that states the measured result."""
