"""Rows in flight, their laws and their text."""
