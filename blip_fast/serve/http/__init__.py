"""HTTP: who may ask, what is asked, and what is refused."""
