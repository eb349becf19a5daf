"""The machine and its system: processes, threads, signals, memory and files."""
