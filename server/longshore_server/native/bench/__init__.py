"""Speed of the engine by itself: `longshore bench core`, or `python -m longshore_server.native.bench`.

It drives a NativeEngine with token-id prompts and reports what it saw beside what the device could do. It
serves nobody, needs no web framework, and downloads nothing.
"""
