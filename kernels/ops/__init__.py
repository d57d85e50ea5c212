"""The `qcompiler::` ops. Importing this package registers them with torch."""
