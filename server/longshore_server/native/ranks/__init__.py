"""Several ranks: processes that share one model, each with its part of every step."""
