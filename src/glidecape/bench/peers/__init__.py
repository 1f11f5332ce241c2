"""Peers: other libraries that decode the same weights, through their own public interface, in the same run."""
