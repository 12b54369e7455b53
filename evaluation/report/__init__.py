"""stage=report: run folders as one page."""
