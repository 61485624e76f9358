"""What a run writes for its reader: metrics, lines on the console, plots, reports."""
