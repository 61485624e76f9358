"""What a run computes on: devices, processes, memory, speed."""
