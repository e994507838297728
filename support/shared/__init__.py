"""What egrsd.py, eval.py and diagnostics.py all stand on."""
