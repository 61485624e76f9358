"""From token files to the rows of a step."""
