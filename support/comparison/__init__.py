"""Parts of baselines.py alone."""
