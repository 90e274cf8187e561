"""Serving: the engine, its socket server, the wire and the clients."""
