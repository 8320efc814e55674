"""The core's HTTP and WebSocket routes, one file each; all of them end in longshore_server.generation."""
