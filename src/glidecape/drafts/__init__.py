"""Draft models: their networks, configurations and files. They know nothing of the decode loop."""
