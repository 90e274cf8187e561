"""Flight delays on real data: event tables, features, training, and a replay through a server."""
