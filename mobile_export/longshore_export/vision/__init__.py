"""The export of models that see: a picture encoder beside the decoder."""
