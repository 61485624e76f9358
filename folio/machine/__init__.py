"""The devices, processes, memory and speed of a run."""
