"""The HTTP side: access and limits, form parsing, pictures by URL, metrics and log."""
