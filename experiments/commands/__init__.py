"""Bodies of the commands. Each command is a function that can be called without a shell."""
