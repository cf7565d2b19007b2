"""What training reads: batches of pixels and texts, in an order that a seed decides."""
