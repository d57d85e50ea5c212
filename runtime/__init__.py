"""The runtime: reads an artifact and generates from it. Never imports transformers."""
