"""The page of stage=explore: a template, a style and ES modules, which document.py joins into one file."""
