"""Judges images and samples: scores, features, distances, reports. Knows no stage."""
