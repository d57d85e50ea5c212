"""Products of the experts of a mixture, tokens sorted by expert."""
