"""Decoded pictures on their way out: formats, provenance, tars, contact sheets."""
