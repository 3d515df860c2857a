"""One file, one command, one function; each is read from top to bottom."""
