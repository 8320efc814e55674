"""The demo: real questions on every tier, with every claim checked before it is printed as true."""
