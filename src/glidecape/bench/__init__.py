"""Measuring: methods compared on one target, in one process, in turn."""
