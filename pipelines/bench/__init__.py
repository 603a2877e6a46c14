"""Speed and memory of every stage, as ratios measured side by side in one run."""
