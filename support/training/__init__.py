"""What only egrsd.py needs: rules of its options, the run folder, the log, checks of a step."""
