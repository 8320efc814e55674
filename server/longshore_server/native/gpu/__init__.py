"""Steps on a GPU: what lies there, what is sent there, and what is replayed as a graph."""
