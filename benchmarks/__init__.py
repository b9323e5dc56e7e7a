"""Measurements of the engine against the published procedure; see README.md. Not part of the package."""
