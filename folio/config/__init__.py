"""Options, files and flags to one frozen object."""
