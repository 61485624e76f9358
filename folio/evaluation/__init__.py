"""Loss, HellaSwag, the tasks of the lm-evaluation-harness."""
