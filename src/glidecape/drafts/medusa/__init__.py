"""Medusa-1."""
