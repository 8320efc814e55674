"""Engines behind one protocol: `base` says what an engine is, `native` is ours."""
