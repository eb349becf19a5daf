"""What only a GPU can show; `run.sh` runs it, and without a GPU it is skipped or rehearsed."""
