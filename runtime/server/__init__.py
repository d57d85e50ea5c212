"""OpenAI-compatible HTTP server; needs the extra `qcompiler[serve]`."""
