"""What only diagnostics.py needs: completions, statistics, figures, pages."""
