"""How a backend is reached, and when it is there at all."""
