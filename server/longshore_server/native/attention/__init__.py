"""Paged attention behind transformers' attention interface: registration, KV memory, implementations."""
