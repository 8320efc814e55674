"""Models for the native engine: how a folder on disk becomes an unmodified transformers model."""
