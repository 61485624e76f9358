"""The commands of GPT-from-scratch: one file per script, with its flags and defaults."""
