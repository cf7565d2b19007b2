"""What training reads: batches of pixels and texts, in an order decided by a seed."""
