"""What the three programs stand on, in rooms by owner; nothing in here imports a program.

shared/ is for all of them, training/ for egrsd.py, evaluation/ for eval.py, diagnosis/ for
diagnostics.py. A function takes the values that it needs, never a program's settings.
"""
