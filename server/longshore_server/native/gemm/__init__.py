"""Rows times a weight: the ways to multiply, and the table of what was measured fastest on a chip."""
