"""Settings found under a limit on the error of the output."""
