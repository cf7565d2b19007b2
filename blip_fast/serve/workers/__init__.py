"""The server's child processes: decoders, which open pictures, and workers, which hold the models."""
