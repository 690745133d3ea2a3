"""What any training program needs besides its method: see run.py, data.py, checkpoint.py."""
