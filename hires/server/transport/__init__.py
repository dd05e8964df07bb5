"""How the server treats the connections of its clients."""
