"""What only eval.py needs: benchmarks, scores, comparison."""
