"""What commands share: options, reading and writing rows, progress bars."""
