"""Measurements: scripts that run us, and peers beside us, in one run and record machine, revision and spread."""
