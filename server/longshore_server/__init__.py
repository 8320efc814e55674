"""The core tier: HTTP workers in front of one engine process. It imports no other tier."""
