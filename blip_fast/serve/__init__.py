"""The server (`blip-fast serve`): an HTTP process that validates requests, decoder processes that open
pictures, and one worker process with the model for each device."""
