"""What one submits: the `owl` command and the named recipes."""
