"""What egrsd.py, eval.py and diagnostics.py stand on. The method is in egrsd.py; nothing here imports it."""
