"""Scores of images and samples, and reports on runs. Imports no stage."""
