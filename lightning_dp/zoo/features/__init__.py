"""Features that no data have shaped, and a folder that keeps them."""
