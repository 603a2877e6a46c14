"""report.md and report.html of an evaluation."""
