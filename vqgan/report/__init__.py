"""stage=report: what a sweep found out, as one page."""
