"""The server: an HTTP process that refuses what is bad, processes that open pictures, and one with the model for each
device (`blip-fast serve`)."""
