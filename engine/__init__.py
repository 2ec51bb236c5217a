"""The model, and what runs it: configuration, training, serving, the server and the command line."""
