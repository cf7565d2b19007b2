"""What commands share: options, rows that are read and written, progress."""
