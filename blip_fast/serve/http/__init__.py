"""What comes in by HTTP: who may ask, fields and pictures, pictures by URL, and what is counted of it."""
