"""The page of stage=explore: a template, a style and ES modules, which page.py joins into one file."""
